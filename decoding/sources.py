"""Where the tokens of a tree come from: each source is an automaton that proposes tokens and says how likely they are."""

import heapq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from array_api_compat import array_namespace, device

from decoding.drafts import Draft, Redrafts
from decoding.engines import Array, Sequences

ORIGINS = ("first", "second", "text", "ngrams")  # who proposes a token: bit i of an origin is ORIGINS[i]
FIRST, SECOND, TEXT, NGRAMS = (1 << i for i in range(len(ORIGINS)))
Option = tuple[float, int, int]  # probability, token, origin
STATES, OPTIONS = 34, 4  # of a trie that a device is sent


class Row(Protocol):
    """A state of a source: what it proposes, and the state behind each token."""

    @property
    def options(self) -> list[Option]: ...

    def after(self, token: int) -> "Row": ...


class Proposer(Protocol):
    """A source in the host's memory.

    Attributes:
        height: tokens that a path of proposals is worth following for.
    """

    @property
    def height(self) -> int: ...

    def start(self, b: int) -> Row:
        """The state of sequence b in front of the first token."""


@dataclass(frozen=True)
class Source:
    """What is proposed behind a path of tokens that begins at the anchor, for each of B sequences.

    A path leads from state 0 to another, and what is proposed behind it depends on that state alone.

    Attributes:
        tokens: ``[B, S, A]`` int64, what each state proposes, each token once; -1 is none.
        probabilities: ``[B, S, A]`` f32, that the target says it there; 0 for none.
        after: ``[B, S, A]`` int64, the state behind each of these tokens. otherwise: ``[B, S]``, behind any other token.
        origins: ``[B, S, A]`` int64, who proposes it (``ORIGINS``).
        height: tokens that a path of proposals can have.
    """

    tokens: Array
    probabilities: Array
    after: Array
    otherwise: Array
    origins: Array
    height: int

    def start(self, b: int) -> "SourceRow":
        return SourceRow(self, b, 0, {})

    def sent(self, memory: Sequences) -> "Source":
        """From the host's memory into an engine's."""
        tables = (self.tokens, self.probabilities, self.after, self.otherwise, self.origins)
        tokens, probabilities, after, otherwise, origins = map(memory.send, tables)
        return Source(tokens, probabilities, after, otherwise, origins, self.height)


class SourceRow:
    """A state of a source's tables. Many paths lead to it: ``rows`` has those of the sequence that were met."""

    def __init__(self, source: Source, b: int, state: int, rows: "dict[int, SourceRow]") -> None:
        self.source, self.b, self.state, self.rows = source, b, state, rows
        rows[state] = self
        self.tokens: list[int] = source.tokens[b, state].tolist()
        proposed = zip(source.probabilities[b, state].tolist(), self.tokens, source.origins[b, state].tolist(), strict=True)
        self.options: list[Option] = [option for option in proposed if option[0] > 0]

    def after(self, token: int) -> "SourceRow":
        spot = self.b, self.state
        known = token in self.tokens
        where = self.source.after[spot][self.tokens.index(token)] if known else self.source.otherwise[spot]
        state = int(where)
        return self.rows.get(state) or SourceRow(self.source, self.b, state, self.rows)


def spread(proposer: Proposer, batch: int) -> Source:
    """A source's likeliest paths as arrays, which a device can be sent: a trie for each sequence, its states the nodes."""
    shape = (batch, STATES, OPTIONS)
    tokens, after = np.full(shape, -1, dtype=np.int64), np.ones(shape, dtype=np.int64)  # state 1 is the end
    probabilities, origins = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int64)
    for b in range(batch):
        queue: list[tuple[float, int, int, Row]] = [(-1.0, 0, 0, proposer.start(b))]  # value, state, depth
        number = 2
        while queue:
            negative, state, depth, row = heapq.heappop(queue)
            for option, (p, token, origin) in enumerate(row.options[:OPTIONS]):
                where = b, state, option
                tokens[where], probabilities[where], origins[where] = token, p, origin
                if number < STATES and depth + 1 < proposer.height:
                    after[where] = number
                    heapq.heappush(queue, (negative * p, number, depth + 1, row.after(token)))
                    number += 1
    return Source(tokens, probabilities, after, np.ones(shape[:2], dtype=np.int64), origins, proposer.height)


def first(draft: Draft) -> Source:
    """The first drafter's marginals: a place's candidates, whatever stands before it."""
    return _tracks(draft.candidates[:, None], draft.probabilities[:, None], FIRST)


def redrafted(draft: Draft, redrafts: Redrafts) -> Source:
    """The first drafter's marginals, and in their place the second drafter's redrafts, where there is one.

    A redraft behind i tokens is there for the case that draft token i + 1 is rejected. So its probabilities for that place are
    renormalised without that token and share 1 - c_{i+1}; behind whatever else stands there, all that follows is the redraft's.
    The tracks of states: the draft's own path, any path off it that no redraft covers, and a path behind each redraft.
    """
    xp = array_namespace(draft.tokens)
    batch, length, width = draft.candidates.shape
    branches = redrafts.kept.shape[1]
    places = xp.arange(length, dtype=xp.int64, device=device(draft.tokens))
    chosen = redrafts.kept[..., None] == places  # [B, K, L]
    covered = xp.any(chosen, axis=1)  # [B, L]
    which = xp.argmax(xp.astype(chosen, xp.int64), axis=1)  # [B, L], void where not covered

    rejected, confidence = draft.candidates[..., :1], xp.astype(draft.probabilities[..., :1], xp.float32)
    spot = (which * length + places)[..., None]
    flat = (batch, branches * length, width)
    instead = xp.take_along_axis(xp.reshape(redrafts.candidates, flat), spot, axis=1)  # [B, L, A]
    odds = xp.take_along_axis(xp.reshape(redrafts.probabilities, flat), spot, axis=1)
    odds = xp.where(instead == rejected, 0.0, xp.astype(odds, xp.float32))
    odds = odds / (xp.sum(odds, axis=-1, keepdims=True) + 1e-9) * (1 - confidence)
    instead = xp.concat([rejected, xp.where(instead == rejected, -1, instead)], axis=-1)[..., :width]
    odds = xp.concat([confidence, odds], axis=-1)[..., :width]

    own_tokens = xp.where(covered[..., None], instead, draft.candidates)
    own_odds = xp.where(covered[..., None], odds, draft.probabilities)
    source = _tracks(
        xp.concat([own_tokens[:, None], draft.candidates[:, None], redrafts.candidates], axis=1),
        xp.concat([own_odds[:, None], draft.probabilities[:, None], redrafts.probabilities], axis=1),
        SECOND,
    )
    # A token off the draft's own path leads to the track of the redraft there, or to the track of none.
    astray = xp.where(covered, which + 2, 1) * (length + 1) + places + 1
    others = (batch, length, width - 1)
    onward = xp.broadcast_to((places + 1)[:, None], (batch, length, 1))
    own_after = xp.concat([onward, xp.broadcast_to(astray[..., None], others)], axis=-1)
    instead_by = xp.where(covered, SECOND, FIRST)[..., None]
    own_origins = xp.concat([xp.full_like(onward, FIRST), xp.broadcast_to(instead_by, others)], axis=-1)
    first_origins = xp.full_like(source.origins[:, : length + 2], FIRST)
    return Source(
        tokens=source.tokens,
        probabilities=source.probabilities,
        after=xp.concat([own_after, source.after[:, length:]], axis=1),
        otherwise=xp.concat([astray, source.otherwise[:, length:]], axis=1),
        origins=xp.concat([own_origins, first_origins, source.origins[:, 2 * length + 2 :]], axis=1),
        height=length,
    )


def _tracks(candidates: Array, probabilities: Array, origin: int) -> Source:
    """T tracks of L places ``[B, T, L, A]``, each with an end: whatever a place is given, the next one follows."""
    xp = array_namespace(candidates)
    batch, tracks, length, width = candidates.shape
    end = xp.zeros((batch, tracks, 1, width), dtype=xp.float32, device=device(candidates))
    states = tracks * (length + 1)
    onward = xp.reshape(xp.arange(states, dtype=xp.int64, device=device(candidates)), (tracks, length + 1))
    onward = xp.reshape(xp.concat([onward[:, 1:], onward[:, -1:]], axis=1), (1, states))
    shape = (batch, states, width)
    return Source(
        tokens=xp.reshape(xp.concat([candidates, xp.astype(end - 1, xp.int64)], axis=2), shape),
        probabilities=xp.reshape(xp.concat([xp.astype(probabilities, xp.float32), end], axis=2), shape),
        after=xp.broadcast_to(onward[..., None], shape),
        otherwise=xp.broadcast_to(onward, (batch, states)),
        origins=xp.full(shape, origin, dtype=xp.int64, device=device(candidates)),
        height=length,
    )
