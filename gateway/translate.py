"""OpenAI's requests → what the client asks; the pieces of answers → OpenAI's responses."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from client import Message, Options, Piece, ServiceError, TokenScore
from client.request import Prompt
from gateway.schema import ChatMessage, ChatRequest, CompletionRequest, Request

Json = dict[str, Any]
REPLACEMENT = "\ufffd"  # stands for bytes that are no character by themselves
REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Ask:
    """One sequence to generate. echo: whether its prompt is shown before its answer."""

    prompt: Prompt
    options: Options
    echo: bool = False


def asks(request: Request) -> list[Ask]:
    """The sequences of a request: ``n`` for each prompt, in the order of their index."""
    prompts: Sequence[Prompt]
    if isinstance(request, ChatRequest):
        prompts = [[_message(message) for message in request.messages]]
    elif isinstance(request, CompletionRequest):
        prompts = request.prompts
    made = []
    for prompt in prompts:
        for number in range(request.n or 1):
            echo = isinstance(request, CompletionRequest) and bool(request.echo)
            options = _options(request, number)
            if echo and (options.logprobs is not None or not isinstance(prompt, str)):  # else nobody knows the text of ids
                options = replace(options, prompt_logprobs=True)
            made.append(Ask(prompt, options, echo))
    return made


def _message(message: ChatMessage) -> Message:
    content = message.content
    made: Message = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "".join(part.text for part in content) if isinstance(content, list) else content,
    }
    for key in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, key)) is not None:
            made[key] = value
    return made


def _options(request: Request, number: int) -> Options:
    """Of the number-th answer to a prompt: each has a seed of its own, the first one the seed that was asked for.

    What a request leaves out is OpenAI's default (temperature 1, top_p 1), but for the length, which the service knows. What
    the service does anyway beside a temperature is not said, since every input of a request costs time there.
    """
    max_tokens, chat, top = request.max_tokens, {}, None
    if isinstance(request, ChatRequest):
        top = (request.top_logprobs or 0) if request.logprobs else None
        max_tokens = max_tokens or request.max_completion_tokens
        for name in ("chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
            chat[name] = getattr(request, name)
        if request.continue_final_message and request.add_generation_prompt is None:
            chat["add_generation_prompt"] = False
    elif isinstance(request, CompletionRequest):
        max_tokens, top = max_tokens or 16, request.logprobs
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Options(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0) or None,
        top_p=None if request.top_p == 1.0 else request.top_p,
        seed=None if request.seed is None else (request.seed + number) % 2**64,
        stop_words=[word for word in stop if word] or None,
        ignore_eos=request.ignore_eos,
        logprobs=top,
        **chat,
    )


@dataclass
class Tally:
    """What the sequences of a request have used so far."""

    last: dict[int, Piece] = field(default_factory=dict)  # by the sequence's index
    prompts: dict[int, int] = field(default_factory=dict)  # tokens of each prompt, by its number
    each: int = 1  # sequences a prompt

    def count(self, index: int, piece: Piece) -> None:
        self.last[index] = piece
        self.prompts[index // self.each] = piece.input_tokens

    def usage(self) -> Json:
        prompt, answer = sum(self.prompts.values()), sum(piece.output_tokens for piece in self.last.values())
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def speculation(piece: Piece) -> Json | None:
    """How drafts fared in an answer, in vLLM's words: ``metrics.speculative_decoding`` of a response, which aiperf reads.

    Zeros, and a length of 1, where nothing was drafted, which a planner may find best; None for an answer without a pass.
    """
    steps = sum(piece.acceptance)
    accepted = sum(count * passes for count, passes in enumerate(piece.acceptance))
    if not steps:
        return None
    return {
        "mean_acceptance_length": 1 + accepted / steps,
        "draft_acceptance_rate": accepted / piece.draft_tokens if piece.draft_tokens else 0.0,
        "acceptance_histogram": list(piece.acceptance),
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": piece.draft_tokens,
        "num_spec_tokens": len(piece.acceptance) - 1,
    }


class Reply(ABC):
    """The responses to one request. What differs between the two endpoints stands in the subclasses."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, request: Request) -> None:
        self.stream = bool(request.stream)
        self.id, self.created, self.model = f"{self.prefix}{uuid.uuid4().hex}", int(time.time()), request.model
        options = request.stream_options
        self.include_usage = bool(options and options.include_usage)
        self.continuous = bool(options and options.continuous_usage_stats)
        self.tally = Tally(each=request.n or 1)
        self.opened: set[int] = set()
        self.offsets: dict[int, int] = {}

    @abstractmethod
    def opening(self) -> Json | None:
        """What a sequence's stream begins with."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """What a piece of a stream holds."""

    @abstractmethod
    def choice(self, text: str) -> Json:
        """What a whole answer holds."""

    @abstractmethod
    def logprobs(self, scores: Sequence[TokenScore], offset: int) -> Json:
        """What is told of tokens. offset: characters of the text before them."""

    def chunks(self, index: int, ask: Ask, piece: Piece) -> list[Json]:
        """What a piece of the sequence ``index`` adds to the stream.

        Nothing precedes a sequence's first token: who measures the time to it takes the first chunk for it. A piece without new
        text (half a character) is told only to those who want to count its tokens.
        """
        self.tally.count(index, piece)
        made = []
        if index not in self.opened:
            self.opened.add(index)
            if (opening := self.opening()) is not None:
                made.append(self._chunk(index, opening))
            if ask.echo:
                made.append(self._chunk(index, self.delta(echoed(ask, piece)), self._told(index, ask, piece.prompt_logprobs)))
        if piece.text or piece.logprobs or (self.continuous and not piece.finish_reason):
            made.append(self._chunk(index, self.delta(piece.text), self._told(index, ask, piece.logprobs)))
        if piece.finish_reason:
            made.append(self._chunk(index, self.delta(""), None, reason(piece)))
        return made

    def _told(self, index: int, ask: Ask, scores: Sequence[TokenScore]) -> Json | None:
        if ask.options.logprobs is None:
            return None
        offset = self.offsets.get(index, 0)
        self.offsets[index] = offset + sum(len(score.text) for score in scores)
        return self.logprobs(scores, offset)

    def closing(self) -> Json | None:
        """The chunk behind the last sequence's end."""
        if not self.include_usage:
            return None
        return self._envelope(self.chunk_kind, [], self.tally.usage()) | self._metrics()

    def whole(self, asked: Sequence[Ask], answers: Sequence[Piece]) -> Json:
        """The response of a request that is not streamed."""
        choices = []
        for index, (ask, answer) in enumerate(zip(asked, answers, strict=True)):
            self.tally.count(index, answer)
            text = (echoed(ask, answer) if ask.echo else "") + answer.text
            scores = (*answer.prompt_logprobs, *answer.logprobs) if ask.echo else answer.logprobs
            told = self._told(index, ask, scores)
            choices.append({"index": index, "logprobs": told, "finish_reason": reason(answer)} | self.choice(text))
        return self._envelope(self.kind, choices, self.tally.usage()) | self._metrics()

    def _metrics(self) -> Json:
        """Of a single answer: several have no one figure."""
        told = [speculation(piece) for piece in self.tally.last.values()]
        return {"metrics": {"speculative_decoding": told[0]}} if len(told) == 1 and told[0] else {}

    def _chunk(self, index: int, content: Json, told: Json | None = None, finish: str | None = None) -> Json:
        choice = {"index": index, "logprobs": told, "finish_reason": finish} | content
        return self._envelope(self.chunk_kind, [choice], self.tally.usage() if self.continuous else None)

    def _envelope(self, kind: str, choices: list[Json], usage: Json | None) -> Json:
        made = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return made | {"usage": usage} if usage or self.include_usage else made


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def choice(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, scores: Sequence[TokenScore], offset: int) -> Json:
        def one(score: TokenScore) -> Json:
            # Half a character is text to nobody, and its bytes are not known here.
            whole = REPLACEMENT not in score.text
            return {"token": score.text, "logprob": score.logprob, "bytes": list(score.text.encode()) if whole else None}

        told = [one(score) | {"top_logprobs": [one(other) for other in score.top]} for score in scores]
        return {"content": told, "refusal": None}


class CompletionReply(Reply):
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def opening(self) -> Json | None:
        return None

    def delta(self, text: str) -> Json:
        return {"text": text}

    def choice(self, text: str) -> Json:
        return {"text": text}

    def logprobs(self, scores: Sequence[TokenScore], offset: int) -> Json:
        offsets = [offset + sum(len(before.text) for before in scores[:place]) for place in range(len(scores))]
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [_by_text(score) for score in scores],
            "text_offset": offsets,
        }


def _by_text(score: TokenScore) -> dict[str, float | None] | None:
    """The likeliest tokens by their text, the place's own among them; of two tokens with one text the likelier."""
    if score.logprob is None:
        return None
    made = {score.text: score.logprob}
    for other in reversed(score.top):
        made[other.text] = other.logprob or 0.0
    return dict(made)


def echoed(ask: Ask, piece: Piece) -> str:
    """A prompt as text."""
    return ask.prompt if isinstance(ask.prompt, str) else "".join(score.text for score in piece.prompt_logprobs)


def reason(piece: Piece) -> str:
    """OpenAI's word for why an answer ended.

    Raises:
        ServiceError: it was ended by nobody who asked for it.
    """
    if piece.finish_reason not in REASONS:
        raise ServiceError(f"the answer was ended: {piece.finish_reason}", "UNAVAILABLE")
    return REASONS[piece.finish_reason]
