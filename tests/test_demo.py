"""The shipped pipeline on its real target: lossless against transformers, above its ablations, served by a real Triton."""

import json
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from client import Client, Options
from decoding import ngrams
from decoding.cycle import Decoder
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines import openvino
from engines.build_directory import BuildDirectory
from export import checkpoints
from export.build import build
from export.config import load
from export.prompts import chat_ids, first_of_each_task, read_prompts
from training import evaluate
from triton_repo.serve import Ports, Server

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "tests"
TIE = 1e-3  # logits that lie closer are one to f32


@pytest.fixture(scope="module")
def pipeline():
    """The pipeline as shipped, but in f32 on any CPU: its weights unfolded, so that no runtime rounds activations."""
    shipped = load(ROOT / "pipeline.yaml")
    engine = shipped.engine.model_copy(update={"precision": "f32", "weights": "f32"})
    return shipped.model_copy(update={"engine": engine})


@pytest.fixture(scope="module")
def built(pipeline):
    build(pipeline, BUILD)
    return BuildDirectory.open(BUILD)


@pytest.fixture(scope="module")
def tokenizer(built):
    return PreTrainedTokenizerFast.from_pretrained(built.tokenizer, local_files_only=True)


@pytest.fixture(scope="module")
def model(pipeline):
    return checkpoints.load_target(checkpoints.open_target(checkpoints.locate(pipeline.target.checkpoint)))


@pytest.fixture(scope="module")
def server(built):
    with Server(BUILD, "127.0.0.1", Ports(0, 0, 0), log=BUILD / "triton.log") as running:
        running.wait_until_ready()
        yield running


def questions(each):
    """The first prompts of every evaluation task."""
    prompts = read_prompts([ROOT / "training" / "prompts" / "eval.jsonl"])
    return [prompt.turns[0] for prompt in first_of_each_task(prompts, each)]


def decode(directory, prompts, tokens, mode, together=8):
    """Answer prompts, some at a time."""
    target, first, second = directory.load()
    options = directory.manifest["decoding"]
    costs = directory.costs(target, first, second)
    decoder = Decoder(
        target,
        first,
        second,
        mode=mode,
        block_size=options["block_size"],
        branches=options["branches"],
        vocabulary=directory.vocabulary,
        redraft=options["redraft"],
        costs=costs,
        ngrams=ngrams.load(directory.ngrams),
    )
    scheduler = Scheduler(decoder, together, costs)
    ends = frozenset(directory.manifest["end_ids"])
    sequences = [Sequence(prompt, tokens, end_ids=ends) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler:
        scheduler.step()
    return [sequence.answer for sequence in sequences]


def generate(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """What the target says at each token of an answer, teacher-forced: ``[len(answer), V]``."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize(
    ("each", "tokens", "together"),
    [
        pytest.param(1, 24, 8, id="8x24"),
        pytest.param(5, 128, 1, id="40x128-alone", marks=pytest.mark.slow),
        pytest.param(5, 128, 8, id="40x128-together", marks=pytest.mark.slow),
    ],
)
def test_greedy_answers_are_what_transformers_generates(built, tokenizer, model, each, tokens, together):
    prompts = [chat_ids(tokenizer, [text]) for text in questions(each)]
    ties = []
    for number, (prompt, answer) in enumerate(zip(prompts, decode(built, prompts, tokens, "auto", together), strict=True)):
        expected = generate(model, prompt, tokens)
        if answer == expected:
            continue
        first = next(i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b)
        best = logits_of(model, prompt, expected[: first + 1])[-1].topk(2)
        ties.append(f"prompt {number}, token {first}: {answer[first]} for {expected[first]}, logits {best.values.tolist()}")
        assert {answer[first], expected[first]} == set(best.indices.tolist()), ties[-1]
        assert best.values[0] - best.values[1] < TIE, ties[-1]
    print("\n".join([f"{len(prompts)} prompts, {len(ties)} ties", *ties]))
    assert len(ties) <= len(prompts) // 8


@pytest.mark.slow
@pytest.mark.skipif(openvino.choose("auto") != "bf16", reason="bf16 needs AMX")
def test_in_bf16_no_token_is_far_from_the_best(built, tokenizer, model):
    """The gap of each committed token to the target's own best, recomputed in f32 (docs/method.md §8)."""
    options = {**built.manifest, "engine": {**built.manifest["engine"], "precision": "bf16"}}
    prompts = [chat_ids(tokenizer, [text]) for text in questions(2)]
    answers = decode(BuildDirectory(built.path, options), prompts, 64, "d2sd")
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = logits_of(model, prompt, answer)
        gaps += (logits.max(-1).values - logits[range(len(answer)), answer]).tolist()
    print(f"{len(gaps)} tokens, {np.mean(np.array(gaps) > 0):.2%} not the f32 best, regret at most {max(gaps):.3f} logit")
    assert max(gaps) < 0.5
    assert np.mean(np.array(gaps) > 0) < 0.05


@pytest.mark.slow
def test_d2sd_accepts_more_than_dflash_and_its_refutations(tmp_path):
    file = tmp_path / "figures.json"
    command = [str(ROOT / "pipeline.yaml"), "--limit", "5", "--json", str(file), "--build", str(BUILD / "shipped")]
    assert evaluate.main(command) == 0
    lengths = {mode: length["mean"] for mode, length in json.loads(file.read_text())["acceptance_length"].items()}
    assert lengths["d2sd"] > 1.8
    for refutation in ("dflash", "naive_samples", "dflash_twice", "random_redraft", "fixed_redraft", "uniform_prefixes"):
        assert lengths["d2sd"] > lengths[refutation], refutation


def test_a_chat_is_streamed_through_triton(server, built, tokenizer, model):
    text = "Explain in three sentences why the sky is blue."
    chat = [{"role": "user", "content": text}]
    expected = tokenizer.decode(generate(model, chat_ids(tokenizer, [text]), 48), skip_special_tokens=True)
    for client in (
        Client(f"127.0.0.1:{server.ports.grpc}", timeout=120),
        Client(f"127.0.0.1:{server.ports.http}", "http", timeout=120),
    ):
        pieces = list(client.stream(chat, Options(max_tokens=48, mode="d2sd")))  # `auto` may draft nothing on a busy machine
        assert "".join(piece.text for piece in pieces) == expected
        assert 1 < len(pieces) == pieces[-1].cycles < pieces[-1].output_tokens  # in fewer target passes than tokens
        assert client.generate(chat, Options(max_tokens=48)).text == expected
        plain = client.generate(chat, Options(max_tokens=48, mode="autoregressive"))
        assert plain.text == expected
        assert plain.cycles == 48


@pytest.mark.slow
def test_memory_does_not_grow(server):
    """Resident memory of the server and its stubs after 200 requests, against 20: of mixed lengths, modes and company."""
    client = Client(f"127.0.0.1:{server.ports.grpc}", timeout=300)
    texts = questions(5)
    sizes = []
    for number in range(1, 201):
        text = texts[number % len(texts)]
        client.generate([{"role": "user", "content": text}], Options(max_tokens=4 + number % 13, temperature=number % 3 / 2))
        if number in (20, 200):
            tree = psutil.Process(server.process.pid)
            sizes.append(sum(p.memory_info().rss for p in [tree, *tree.children(recursive=True)]))
    print(f"{os.cpu_count()} CPUs; after 20 requests {sizes[0] / 2**20:.0f} MiB, after 200 {sizes[1] / 2**20:.0f} MiB")
    assert sizes[1] < 1.05 * sizes[0]
