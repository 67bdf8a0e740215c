"""A request and its responses, in the two forms in which the service speaks: tensors (gRPC) and JSON (HTTP)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import numpy as np
from tritonclient.utils import np_to_triton_dtype

MODEL, DECODER = "ensemble", "d2sd"  # what is asked, and the part of it that is told to stop
ALWAYS = (  # outputs that every answer is made of
    *("text_output", "output_tokens", "cycles", "finish_reason"),
    *("num_input_tokens", "num_draft_tokens", "acceptance_histogram"),
)
ON_REQUEST = {  # others, and the inputs of which one asks for them
    "log_probs": ("return_log_probs", "return_prompt_log_probs"),
    "prompt_log_probs": ("return_prompt_log_probs",),
    "trace_output": ("trace",),
}
ENSEMBLE = f"in ensemble '{MODEL}', "  # how Triton begins an error of one of its steps
# What errors of the moment say, ours and Triton's own; and what those of a request at fault say.
BUSY = ("try again", "Server not ready", "Server is stopping", "not at ready state", "Exceeds maximum queue size")
REFUSED = (": found ", "allowed: ", "messages: ", "refuses it", "not JSON", "request has 0 inputs")


class ServiceError(RuntimeError):
    """The service refused a request or could not be reached; the message is its own.

    Attributes:
        status: the name of a gRPC status: INVALID_ARGUMENT for a request at fault, UNAVAILABLE for a service that is not
            there or takes nothing now.
    """

    def __init__(self, message: str, status: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.status = status


def status_of(message: str) -> str:
    """The status of an error that came as a response of a gRPC stream, by its words: Triton sends nothing else of it.

    It would send the status itself to who asks with ``triton_grpc_error``, but ends such streams in a way that now and then is
    its own end (2.51: what it notes when it finishes one is looked at twice and holds once, so the stream's state may be used
    after it was freed).
    """
    if any(words in message for words in BUSY):
        return "UNAVAILABLE"
    return "INVALID_ARGUMENT" if any(words in message for words in REFUSED) else "INTERNAL"


class Message(TypedDict, total=False):
    """A chat message: role and content, and what a chat with tools or reasoning has besides."""

    role: str  # system, developer, user, assistant or tool
    content: str | None
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str


@dataclass(frozen=True)
class Options:
    """How an answer is generated; what is None is left to the service.

    Attributes:
        max_tokens: length of the answer, at most.
        temperature: 0 is greedy. top_k: 0 keeps all tokens. top_p: above 0 and at most 1.
        seed: of the draws; the same request with the same seed has the same answer, as far as rounding allows (Seeds in
            docs/triton.md).
        stop_words: texts, the first of which ends the answer and does not belong to it.
        end_id: token that ends the answer instead of the target's own; -1 for the target's own.
        mode: decoding mode instead of the pipeline's.
        parse_special: whether the text of a control token in a text prompt stands for that token.
        chat_template_kwargs: variables of the target's chat template, ``enable_thinking`` or ``tools`` for one.
        add_generation_prompt: whether the opening of an answer follows a chat (it does if None).
        continue_final_message: whether a chat's last message is left open instead, and the answer goes on with it.
        logprobs: how many of the likeliest tokens are told, at each place of the answer, with the target's log-probabilities,
            0 for the answer's own alone; None for none.
        prompt_logprobs: whether they are told at each place of the prompt too.
        ignore_eos: whether the answer goes on behind a token that would end it.
        trace: whether the last piece tells how every token came about (``client.trace`` shows it).
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_words: Sequence[str] | None = None
    end_id: int | None = None
    mode: str | None = None
    parse_special: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: bool | None = None
    trace: bool | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token, its text, and the logarithm of the probability that the target gives it; None where it follows nothing.

    ``top`` holds the likeliest tokens of its place, best first.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple["TokenScore", ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a response adds to an answer.

    Attributes:
        text: the new text. output_tokens: tokens of the answer so far. cycles: target passes so far.
        finish_reason: empty while the answer grows; then end, length, stop or cancelled.
        input_tokens: tokens of the prompt.
        draft_tokens: verified so far. acceptance: how many of the passes so far accepted 0, 1, … of them.
        logprobs: of the new tokens, if they were asked for. prompt_logprobs: of the prompt's, in the first piece.
        trace: in the last piece, if it was asked for (docs/triton.md).
    """

    text: str
    output_tokens: int
    cycles: int
    finish_reason: str
    input_tokens: int
    draft_tokens: int = 0
    acceptance: tuple[int, ...] = ()
    logprobs: tuple[TokenScore, ...] = ()
    prompt_logprobs: tuple[TokenScore, ...] = ()
    trace: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Answer(Piece):
    """A whole answer."""

    @property
    def acceptance_length(self) -> float:
        """Tokens that a target pass committed, on average."""
        return self.output_tokens / self.cycles


def join(pieces: Sequence[Piece]) -> Answer:
    """Put the pieces of an answer together."""
    if not pieces:
        raise ServiceError("the service ended the stream without an answer")
    last = pieces[-1]
    return Answer(
        *("".join(piece.text for piece in pieces), last.output_tokens, last.cycles, last.finish_reason, last.input_tokens),
        *(last.draft_tokens, last.acceptance),
        logprobs=tuple(score for piece in pieces for score in piece.logprobs),
        prompt_logprobs=pieces[0].prompt_logprobs,
        trace=last.trace,
    )


DTYPES = {
    "prompt_ids": np.int32,
    "max_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.uint64,
    "num_top_log_probs": np.int32,
    "end_id": np.int32,
}


Prompt = str | Sequence[Message] | Sequence[int]  # text, a chat, or token ids


def fields_of(prompt: Prompt, options: Options, stream: bool) -> dict[str, Any]:
    """The inputs that a request names: ``text_input`` for text, ``prompt_ids`` for token ids, ``messages`` for a chat."""
    named: dict[str, Any] = {"stream": stream}
    if isinstance(prompt, str):
        named["text_input"] = prompt
    elif prompt and isinstance(prompt[0], int):
        named["prompt_ids"] = list(prompt)
    else:
        named["messages"] = json.dumps(list(prompt), ensure_ascii=False)
    named |= {option.name: getattr(options, option.name) for option in fields(options)}
    if (top := named.pop("logprobs")) is not None:
        named |= {"return_log_probs": True, "num_top_log_probs": top}
    named["return_prompt_log_probs"] = named.pop("prompt_logprobs")
    if options.chat_template_kwargs is not None:
        named["chat_template_kwargs"] = json.dumps(dict(options.chat_template_kwargs), ensure_ascii=False)
    return {name: value for name, value in named.items() if value is not None}


def to_tensors(named: Mapping[str, Any], module: Any) -> list[Any]:
    """The inputs as ``InferInput`` of a tritonclient module.

    Raises:
        ValueError: a number that its tensor cannot hold.
    """
    tensors = []
    for name, value in named.items():
        if isinstance(value, bool):
            array = np.array([[value]])
        elif name in DTYPES:
            try:
                array = np.array([value if isinstance(value, list) else [value]], dtype=DTYPES[name])
            except OverflowError:
                raise ValueError(f"{name}: found {value}, which does not fit {DTYPES[name].__name__}") from None
        else:
            texts = [value] if isinstance(value, str) else list(value)
            array = np.array([[text.encode() for text in texts]], dtype=np.object_)
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def to_outputs(named: Mapping[str, Any], module: Any) -> list[Any]:
    """The outputs that a request with these inputs needs, as ``InferRequestedOutput``: each costs time in every response."""
    asked = [name for name, inputs in ON_REQUEST.items() if any(named.get(one) for one in inputs)]
    return [module.InferRequestedOutput(name) for name in (*ALWAYS, *asked)]


def from_tensors(response: Any) -> Piece:
    """A response of a gRPC stream, a ``ModelInferResponse``: its tensors have one value each, but for the histogram.

    Read by itself, as ``as_numpy`` looks for its tensor among all of them and makes an array for a number.
    """
    told = dict(zip([output.name for output in response.outputs], response.raw_output_contents, strict=True))

    def text(name: str) -> str:
        return told[name][4:].decode() if name in told else ""  # behind its length

    def number(name: str) -> int:
        return int.from_bytes(told[name], "little", signed=True)

    return Piece(
        text("text_output"),
        number("output_tokens"),
        number("cycles"),
        text("finish_reason"),
        number("num_input_tokens"),
        number("num_draft_tokens"),
        tuple(np.frombuffer(told["acceptance_histogram"], "<i4").tolist()),
        _scores(text("log_probs")),
        _scores(text("prompt_log_probs")),
        json.loads(trace) if (trace := text("trace_output")) else None,
    )


class Events:
    """The data of server-sent events, out of their bytes. A line ends with LF or CR LF (HTML standard, 9.2.6), not with what
    else breaks lines in Unicode, as ``httpx`` has it: the JSON of an answer may hold that."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, chunk: bytes) -> list[str]:
        """What is whole by now."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.removeprefix(b"data: ").decode() for line in lines if line.startswith(b"data: ")]


def from_json(line: str) -> Piece:
    """A response of the HTTP endpoints.

    Raises:
        ServiceError: it is an error.
    """
    try:
        body = json.loads(line)
    except ValueError:
        raise ServiceError(f"the service answered with something else than JSON: {line[:200]}") from None
    if "error" in body:
        raise ServiceError(body["error"].removeprefix(ENSEMBLE))
    histogram = body["acceptance_histogram"]  # JSON of Triton's writes one number without its list
    return Piece(
        text=body["text_output"],
        output_tokens=body["output_tokens"],
        cycles=body["cycles"],
        finish_reason=body["finish_reason"],
        input_tokens=body["num_input_tokens"],
        draft_tokens=body["num_draft_tokens"],
        acceptance=tuple(histogram if isinstance(histogram, list) else [histogram]),
        logprobs=_scores(body["log_probs"]),
        prompt_logprobs=_scores(body["prompt_log_probs"]),
        trace=json.loads(body["trace_output"] or "null"),
    )


def _scores(told: str) -> tuple[TokenScore, ...]:
    """``[[id, text, log-probability, [[id, text, log-probability], …]], …]`` as JSON, or nothing."""
    if not told:
        return ()
    return tuple(
        TokenScore(token, text, value, tuple(TokenScore(*other) for other in top))
        for token, text, value, top in json.loads(told)
    )
