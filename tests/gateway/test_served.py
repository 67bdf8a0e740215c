"""The official client against a gateway before a real Triton."""

import asyncio
import json
import socket
import time

import httpx
import openai
import psutil
import pytest
import torch

from client import Client, Options
from gateway.translate import speculation
from tests import tiny

CHAT = [{"role": "user", "content": "größer 日本語 🎉?"}]
COMMON = {"model": "d2sd", "temperature": 0}


@pytest.fixture(scope="module")
def asked(url):
    with openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def service(triton):
    """The service without a gateway."""
    return Client(f"127.0.0.1:{triton.ports.grpc}", timeout=60)


def test_a_chat_is_the_services(asked, service):
    expected = service.generate(CHAT, Options(max_tokens=30))
    answer = asked.chat.completions.create(messages=CHAT, max_completion_tokens=30, **COMMON)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == {"end": "stop"}.get(expected.finish_reason, expected.finish_reason)
    prompt = tiny.tokenizer().apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)
    assert answer.usage.completion_tokens == expected.output_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + expected.output_tokens


def test_a_streamed_chat(asked, service):
    expected = service.generate(CHAT, Options(max_tokens=30))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(asked.chat.completions.create(messages=CHAT, max_tokens=30, **COMMON, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_asynchronous_client(url, service):
    texts = ["the quick", "brown fox", "größer", "日本語 🎉"]
    expected = [service.generate(text, Options(max_tokens=20)).text for text in texts]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=60) as asked:

        async def ask(text):
            stream = await asked.completions.create(prompt=text, max_tokens=20, stream=True, **COMMON)
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert await asyncio.gather(*(ask(text) for text in texts)) == expected


def test_every_chunk_counts_tokens_if_asked(url):
    body = {**COMMON, "prompt": "the quick", "max_tokens": 25, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 25
    assert len(set(counts)) == chunks[-1]["metrics"]["speculative_decoding"]["num_spec_steps"]  # each pass was told


def test_acceptance_is_told_as_vllm_tells_it(url, service):
    """Of every answer, whether ``auto`` found drafting worth its while in it or not."""
    body = {**COMMON, "prompt": "the quick", "max_tokens": 25}
    whole = httpx.post(f"{url}/completions", json=body, timeout=60).json()
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = httpx.post(f"{url}/completions", json=streaming, timeout=60).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    streamed = json.loads(events[-3].removeprefix("data: "))
    assert streamed["choices"] == []
    for response in (whole, streamed):
        assert response["usage"]["completion_tokens"] == 25
        check_speculation(response["metrics"]["speculative_decoding"])
    drafted = speculation(service.generate("the quick", Options(max_tokens=25, mode="dflash")))
    check_speculation(drafted)
    assert drafted["num_draft_tokens"] > 0
    plain = speculation(service.generate("the quick", Options(max_tokens=25, mode="autoregressive")))
    check_speculation(plain)
    assert (plain["num_draft_tokens"], plain["mean_acceptance_length"], plain["num_spec_steps"]) == (0, 1.0, 25)
    several = httpx.post(f"{url}/completions", json={**body, "n": 2}, timeout=60).json()
    assert "metrics" not in several


def check_speculation(told):
    """That the figures of an answer of 25 tokens agree with each other."""
    histogram = dict(enumerate(told["acceptance_histogram"]))
    assert sum(histogram.values()) == told["num_spec_steps"]
    assert sum(count * steps for count, steps in histogram.items()) == told["num_accepted_draft_tokens"]
    assert told["num_spec_steps"] + told["num_accepted_draft_tokens"] == 25
    assert told["mean_acceptance_length"] == pytest.approx(25 / told["num_spec_steps"])
    assert len(histogram) == told["num_spec_tokens"] + 1
    assert told["num_accepted_draft_tokens"] <= told["num_draft_tokens"]
    assert told["draft_acceptance_rate"] * told["num_draft_tokens"] == pytest.approx(told["num_accepted_draft_tokens"])


def test_several_prompts_token_ids_and_echo(asked, service):
    ids = tiny.tokenizer()("the quick")["input_ids"]
    expected = service.generate("the quick", Options(max_tokens=10)).text
    assert service.generate(ids, Options(max_tokens=10)).text == expected
    by_ids = asked.completions.create(prompt=[ids, ids], max_tokens=10, **COMMON)
    assert [choice.text for choice in by_ids.choices] == [expected] * 2
    by_text = asked.completions.create(prompt=["x", "the quick"], max_tokens=10, echo=True, **COMMON)
    assert by_text.choices[1].text == "the quick" + expected
    assert by_text.usage.prompt_tokens == len(ids) + 1


def test_several_answers_differ_and_a_seed_repeats_them(asked):
    def ask(**more):
        answer = asked.completions.create(model="d2sd", prompt="chance", max_tokens=20, n=3, **more)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens * 3 + 60 >= answer.usage.total_tokens > answer.usage.prompt_tokens
        return [choice.text for choice in answer.choices]

    assert len(set(ask())) == 3
    assert ask() != ask()
    seeded = ask(seed=5)
    assert len(set(seeded)) == 3
    assert ask(seed=5) == seeded
    assert ask(seed=-5) == ask(seed=-5)


def test_several_answers_streamed(asked):
    options = {"model": "d2sd", "prompt": "chance", "max_tokens": 20, "n": 3, "seed": 5}
    whole = [choice.text for choice in asked.completions.create(**options).choices]
    texts, ends = ["", "", ""], [0, 0, 0]
    for chunk in asked.completions.create(stream=True, **options):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        ends[choice.index] += choice.finish_reason is not None
    assert (texts, ends) == (whole, [1, 1, 1])


def test_stop(asked, service):
    whole = service.generate("stop here", Options(max_tokens=40)).text
    word = whole[8:10]
    for stop in (word, [word], ["never said 0", word]):
        answer = asked.completions.create(prompt="stop here", max_tokens=40, stop=stop, **COMMON)
        assert answer.choices[0].text == whole[: whole.index(word)]
        assert answer.choices[0].finish_reason == "stop"


def test_parts_and_roles(asked):
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": " there"}]
    other = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    answers = [asked.chat.completions.create(messages=chat, max_tokens=9, **COMMON) for chat in (plain, other)]
    assert answers[0].choices[0].message == answers[1].choices[0].message


def test_what_a_chat_template_is_told(asked, service):
    chat = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one, two"}]
    more = {"continue_final_message": True}
    answer = asked.chat.completions.create(messages=chat, max_tokens=9, extra_body=more, **COMMON)
    expected = service.generate("<s>user\ncount</s><s>assistant\none, two", Options(max_tokens=9, parse_special=True))
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.input_tokens
    for more, said in (
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking: unknown"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "found beside add_generation_prompt"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            asked.chat.completions.create(messages=chat, max_tokens=9, extra_body=more, **COMMON)


@pytest.fixture(scope="module")
def target():
    """Log-probabilities of ids by transformers: those of each but the first, over the whole vocabulary."""
    model = tiny.target()

    def of(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)

    return of


def test_log_probabilities_are_the_targets(asked, target):
    """Of a chat's answer, greedy and drawn; streamed they are the same."""
    chat = [{"role": "user", "content": "score"}]
    tokenizer = tiny.tokenizer()
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    texts = [tokenizer.decode([token]) for token in range(300)]
    options = {"model": "d2sd", "messages": chat, "max_tokens": 12, "seed": 3}
    options |= {"logprobs": True, "top_logprobs": 5}
    for temperature in (0, 1):
        answer = asked.chat.completions.create(**options, temperature=temperature)
        told = answer.choices[0].logprobs.content
        assert len(told) == answer.usage.completion_tokens
        assert answer.usage.prompt_tokens == len(ids)
        said = list(ids)
        for score in told:
            values = target([*said, 0])[-1]
            best = values.topk(5)
            assert [one.logprob for one in score.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
            assert score.top_logprobs[0].token == texts[int(best.indices[0])]
            candidates = [one for one, text in enumerate(texts) if text == score.token]
            own = min(candidates, key=lambda one: abs(values[one].item() - score.logprob))
            assert score.logprob == pytest.approx(values[own].item(), abs=1e-3)
            said.append(own)
        streamed = []
        for chunk in asked.chat.completions.create(**options, temperature=temperature, stream=True):
            streamed += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
        # Rounding differs with the rows that a pass happens to have, which is the planner's to choose.
        for now, before in zip(streamed, told, strict=True):
            assert now.token == before.token
            assert [one.token for one in now.top_logprobs] == [one.token for one in before.top_logprobs]
            values = [[one.logprob for one in (score, *score.top_logprobs)] for score in (now, before)]
            assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_log_probabilities_of_a_prompt(asked, target):
    """What lm-eval asks for: token ids, echoed, with one token of an answer; twice, though the second prompt is known then."""
    ids = tiny.tokenizer()("the quick brown fox jumps over größer 日本語 " * 6)["input_ids"]
    values = target(ids)
    expected = [None, *(values[place, token].item() for place, token in enumerate(ids[1:]))]
    for _ in range(2):
        answer = asked.completions.create(prompt=[ids], max_tokens=1, logprobs=1, echo=True, **COMMON)
        told = answer.choices[0].logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == len(ids) + 1
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        assert told.token_logprobs[1:-1] == pytest.approx(expected[1:], abs=1e-3)
        for value, top, place in zip(told.token_logprobs[1:-1], told.top_logprobs[1:-1], values, strict=True):
            assert max(top.values()) == pytest.approx(place.max().item(), abs=1e-3)
            assert value <= max(top.values())
        assert told.text_offset == [sum(map(len, told.tokens[:place])) for place in range(len(told.tokens))]
        assert answer.choices[0].text.startswith("".join(told.tokens[:-1]))
    text = "the quick brown"
    by_text = asked.completions.create(prompt=text, max_tokens=2, logprobs=0, echo=True, **COMMON).choices[0]
    assert "".join(by_text.logprobs.tokens[:-2]) == text
    assert by_text.text.startswith(text)


def test_an_answer_that_no_token_ends(asked):
    def lengths(**more):
        made = asked.completions.create(model="d2sd", prompt="x", max_tokens=60, n=8, seed=1, temperature=1.5, **more)
        return made.usage.completion_tokens, {choice.finish_reason for choice in made.choices}

    tokens, reasons = lengths()
    assert (tokens < 480, "stop" in reasons) == (True, True)
    assert lengths(extra_body={"ignore_eos": True, "min_tokens": 60}) == (480, {"length"})
    with pytest.raises(openai.BadRequestError, match="min_tokens: found 60, allowed: 0"):
        lengths(extra_body={"min_tokens": 60})


def test_models(asked):
    assert [model.id for model in asked.models.list()] == ["d2sd"]
    assert asked.models.retrieve("d2sd").owned_by == "d2sd-triton"
    with pytest.raises(openai.NotFoundError):
        asked.models.retrieve("gpt-9")


ERRORS = [
    ({"model": "gpt-9"}, openai.NotFoundError, "model", "found 'gpt-9', allowed: d2sd"),
    ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty", "found 0.5, allowed: 0, null"),
    ({"logit_bias": {"5": 3}}, openai.BadRequestError, "logit_bias", "allowed: {}, null"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", "allowed: [], null"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "json_object"),
    ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens", "allowed: up to"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, openai.BadRequestError, None, "allowed: one of the two"),
    ({"temperature": -1}, openai.BadRequestError, "temperature", "found -1"),
    ({"extra_body": {"frobnicate": 1}}, openai.BadRequestError, "frobnicate", "no parameter known here"),
    ({"messages": []}, openai.BadRequestError, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, openai.BadRequestError, "prompt", "found 616 tokens"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, None, "beside stream"),
]


@pytest.mark.parametrize(("more", "kind", "param", "said"), ERRORS, ids=[next(iter(error[0])) for error in ERRORS])
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(asked, more, kind, param, said, stream):
    if "stream_options" in more and stream:
        return
    with pytest.raises(kind) as caught:
        asked.chat.completions.create(**{"messages": CHAT, "max_tokens": 5, "stream": stream, **COMMON, **more})
    assert said in str(caught.value)
    assert caught.value.param == param
    assert "\n" not in caught.value.body["message"]


def test_a_prompt_too_long_says_so_to_programs(asked):
    with pytest.raises(openai.BadRequestError) as caught:
        asked.completions.create(prompt="x" * 600, **COMMON)
    assert caught.value.code == "context_length_exceeded"


def test_a_request_keeps_its_id(url):
    body = {**COMMON, "prompt": "x", "max_tokens": 2}
    answer = httpx.post(f"{url}/completions", json=body, headers={"x-request-id": "abc-1"}, timeout=60)
    assert answer.headers["x-request-id"] == "abc-1"
    odd = httpx.post(f"{url}/completions", json=body, headers={"x-request-id": "a b\\"}, timeout=60)
    assert odd.headers["x-request-id"] not in ("", "a b\\")


def test_health_and_metrics(url):
    base = url.removesuffix("/v1")
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(base + path).status_code == 200
    httpx.post(f"{url}/completions", json={**COMMON, "prompt": "x", "max_tokens": 2}, timeout=60)
    text = httpx.get(f"{base}/metrics").text
    assert 'd2sd_gateway_requests_total{path="/v1/completions",status="200"}' in text
    assert "d2sd_gateway_replicas_ready 1.0" in text


def test_a_gateway_without_a_service_is_not_ready():
    from tests.gateway.conftest import opened

    with opened("--triton", "127.0.0.1:9") as address:
        assert httpx.get(address.removesuffix("/v1") + "/health/live").status_code == 200
        ready = httpx.get(address.removesuffix("/v1") + "/health/ready")
        answer = httpx.post(f"{address}/completions", json={**COMMON, "prompt": "x"})
        for response in (ready, answer):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "overloaded_error"


def test_it_stands_back_for_engines():
    from tests.gateway.conftest import opened

    with opened("--triton", "127.0.0.1:9", "--nice", "7"):
        [own] = [process for process in psutil.Process().children() if "--nice" in process.cmdline()]
        assert own.nice() == min(psutil.Process().nice() + 7, 19)


def test_a_client_that_leaves_frees_its_place(url, asked):
    """More than there are places for, dropped in the midst of streams, and of answers that nobody waits for."""
    base = httpx.URL(url.removesuffix("/v1"))
    ended = 'd2sd_gateway_requests_total{path="/v1/completions"'

    def told(name):
        lines = httpx.get(base.join("/metrics")).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = told(ended)
    body = {**COMMON, "prompt": "leave", "max_tokens": 150}
    whole = httpx.Request("POST", f"{url}/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in whole.headers.items())
    for _ in range(4):
        with httpx.stream("POST", f"{url}/completions", json={**body, "stream": True}, timeout=60) as response:
            next(response.iter_lines())
        with socket.create_connection((base.host, base.port)) as sent:
            sent.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + whole.read())
    began = time.monotonic()
    while told(ended) < before + 8 or told("d2sd_gateway_requests_in_flight"):
        assert time.monotonic() - began < 5
        time.sleep(0.05)
    assert asked.completions.create(prompt="x", max_tokens=3, **COMMON).usage.completion_tokens == 3
