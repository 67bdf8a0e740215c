"""The drafters at work: first drafts, and redrafts behind the boundaries chosen (docs/method.md §1, §3)."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device

from decoding.engines import Array
from decoding.follower import Follower
from decoding.sequence import Sequence


@dataclass(frozen=True)
class Draft:
    """The first drafts of B sequences.

    Attributes:
        sequences: whose they are. anchors: ``[B]``.
        candidates: ``[B, γ-1, A]`` likeliest tokens of places 1 … γ-1, best first. probabilities: as many.
    """

    sequences: Many[Sequence]
    anchors: Array
    candidates: Array
    probabilities: Array

    @property
    def tokens(self) -> Array:
        """``[B, γ-1]``."""
        return self.candidates[..., 0]

    def of(self, rows: Many[int]) -> "Draft":
        """Those of some of the sequences."""
        if list(rows) == list(range(len(self.sequences))):
            return self
        xp = array_namespace(self.anchors)
        parts = (xp.stack([x[b] for b in rows]) for x in (self.anchors, self.candidates, self.probabilities))
        return Draft([self.sequences[b] for b in rows], *parts)


@dataclass(frozen=True)
class Redrafts:
    """K redrafts of each of B first drafts.

    Attributes:
        kept: ``[B, K]``, how many draft tokens each keeps.
        candidates: ``[B, K, γ-1, A]``, best first; void at the places kept. probabilities: as many.
    """

    kept: Array
    candidates: Array
    probabilities: Array


def first_draft(drafter: Follower, sequences: Many[Sequence], anchors: Array) -> Draft:
    """Draft a block behind each anchor, in one pass. anchors: ``[B]``, in the runtime's memory."""
    xp = array_namespace(anchors)
    blocks = np.full((len(sequences), drafter.block_size), drafter.engine.mask_id, dtype=np.int64)
    blocks[:, 0] = [s.anchor for s in sequences]
    made = drafter.draft(sequences, blocks)
    return Draft(sequences, anchors, *(xp.asarray(x[:, 1:], copy=True) for x in made))


def redraft(drafter: Follower, asked: Many[tuple[Draft, Array]]) -> list[Redrafts]:
    """Fill the branches of all sequences in one pass: K blocks a sequence, blind to each other.

    Args:
        asked: first drafts, and how many of their tokens each branch keeps, ``[B, K]``; K may differ from one to the next.
    """
    if not asked:
        return []
    xp = array_namespace(asked[0][1])
    most = max(kept.shape[1] for _, kept in asked)
    # A sequence with fewer branches than others repeats its last.
    kept = xp.concat([xp.concat([own, *[own[:, -1:]] * (most - own.shape[1])], axis=1) for _, own in asked])
    whole = xp.concat([xp.concat([draft.anchors[:, None], draft.tokens], axis=1) for draft, _ in asked])[:, None]  # [B, 1, γ]
    places = xp.arange(drafter.block_size, device=device(kept))
    blocks = xp.where(places <= kept[..., None], whole, drafter.engine.mask_id)  # [B, K, γ]
    sequences = [s for draft, _ in asked for s in draft.sequences]
    made = drafter.draft(sequences, xp.reshape(blocks, (len(sequences), -1)))
    candidates, probabilities = (xp.reshape(xp.asarray(x, copy=True), (*blocks.shape, -1))[:, :, 1:] for x in made)
    made_for, start = [], 0
    for draft, own in asked:
        mine = slice(start, start := start + len(draft.sequences))
        made_for.append(Redrafts(own, candidates[mine, : own.shape[1]], probabilities[mine, : own.shape[1]]))
    return made_for
