"""One request's tokens on their way to an answer."""

import math
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from decoding.modes import ModeName
from decoding.sampling import Sampling

if TYPE_CHECKING:
    from decoding.trace import Trace

Score = tuple[float, list[tuple[int, float]]]  # a token's log-probability, and the likeliest tokens with theirs, best first
Finish = Literal["end", "length", "stop", "timeout", "cancelled"]


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been committed behind it.

    Attributes:
        tokens: the prompt, then the committed answer. The last one is the anchor: its successor is unknown, and it is not
            in any KV cache.
        max_tokens: the answer ends when it has as many.
        end_ids: the answer ends with the first of these, which belongs to it.
        deadline: the answer ends when ``time.monotonic()`` is there, with what it has.
        top: how many of the likeliest tokens are told at each place with the target's log-probabilities; None for none.
        scores_prompt: whether the prompt's tokens, too, get theirs.
        trace: takes in what becomes of it cycle by cycle; None where nobody asks.
        scores: of the answer's tokens. prompt_scores: of the prompt's tokens but for the first, which follows nothing.
        computed: how many of the tokens are in the target's cache.
        cycles: target passes spent on the answer.
        drafted: draft tokens that they verified. accepted: how many of the passes accepted 0, 1, … of them.
        finish: why the answer ended, or None.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    mode: ModeName | None = None
    deadline: float = math.inf
    top: int | None = None
    scores_prompt: bool = False
    trace: "Trace | None" = None
    tokens: list[int] = field(init=False)
    computed: int = field(init=False, default=0)
    cycles: int = field(init=False, default=0)
    drafted: int = field(init=False, default=0)
    accepted: list[int] = field(init=False, default_factory=list)
    finish: Finish | None = field(init=False, default=None)
    scores: list[Score] = field(init=False, default_factory=list)
    prompt_scores: list[Score] = field(init=False, default_factory=list)
    _rng: np.random.Generator = field(init=False)
    _drawn: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: found no token, allowed: one at least")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: found {self.max_tokens}, allowed: 1 or more")
        self.tokens = list(self.prompt)
        self._rng = np.random.default_rng(self.sampling.seed)
        self._drawn = np.empty(0)

    @property
    def anchor(self) -> int:
        return self.tokens[-1]

    @property
    def position(self) -> int:
        """Of the anchor, which is also the number of tokens committed before it."""
        return len(self.tokens) - 1

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """The request's random numbers for its next ``count`` tokens, ``[count]`` in [0, 1): a token's is its own, however many
        cycles ask for it."""
        missing = max(0, count - len(self._drawn))
        self._drawn = np.concatenate([self._drawn, self._rng.random(missing)])
        return self._drawn[:count]

    def draft_rng(self) -> np.random.Generator:
        """For what a mode draws while drafting. The request's own numbers are for the target's choices alone."""
        return np.random.default_rng((self.sampling.seed, len(self.tokens)))

    def count(self, drafted: int, committed: int) -> None:
        """Count a pass that verified so many draft tokens and committed so many tokens."""
        self.cycles += 1
        self.drafted += drafted
        self.accepted += [0] * (committed - len(self.accepted))
        self.accepted[committed - 1] += 1

    def commit(self, tokens: Ids[int]) -> int:
        """Append committed tokens, up to the one that ends the answer. Returns how many were appended."""
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            self._drawn = self._drawn[1:]
            if token in self.end_ids:
                self.finish = "end"
            elif len(self.tokens) - len(self.prompt) >= self.max_tokens:
                self.finish = "length"
            if self.finish:
                return count
        return len(tokens)
