"""What the fixed modes verify: the first block, and whole branches beside it (docs/method.md §7)."""

import numpy as np
from array_api_compat import array_namespace, device

from decoding import boundary
from decoding.drafts import Draft, Redrafts
from decoding.engines import Array, Sequences
from decoding.modes import Redraft, Selection


def boundaries(draft: Draft, selection: Selection, branches: int, memory: Sequences) -> Array:
    """How many draft tokens each branch keeps, ``[B, K]``. memory: of the engine that the draft lies with."""
    if selection == "confidence":
        return boundary.likeliest(draft.probabilities[..., 0], branches)
    places = draft.tokens.shape[1]
    return memory.send(np.stack([boundary.anywhere(places, branches, s.draft_rng()) for s in draft.sequences]))


def redrafted(draft: Draft, redrafts: Redrafts, redraft: Redraft) -> Array:
    """The tails ``[B, K, γ-1]`` of redrafts.

    A branch at i matters only if draft token i+1 is wrong, so an exclusive redraft may not say it again.
    """
    best = redrafts.candidates[..., 0]
    if redraft == "free":
        return best
    refused = _at(redrafts.kept, best) & (best == draft.tokens[:, None])
    xp = array_namespace(best)
    return xp.where(refused, redrafts.candidates[..., 1], best)


def runner_up(draft: Draft, kept: Array) -> Array:
    """The first draft with its second best token at the boundary: tails ``[B, K, γ-1]``."""
    tokens = draft.tokens[:, None]
    xp = array_namespace(tokens)
    return xp.where(_at(kept, tokens), draft.candidates[:, None, :, 1], tokens)


def random(draft: Draft, kept: Array, vocabulary: int, memory: Sequences) -> Array:
    """Tails ``[B, K, γ-1]`` of any tokens."""
    size = (kept.shape[1], draft.tokens.shape[1])
    return memory.send(np.stack([s.draft_rng().integers(vocabulary, size=size) for s in draft.sequences]))


def fixed(kept: Array) -> Array:
    """Tails that say token 0 everywhere, ``[B, K, 1]``."""
    return array_namespace(kept).zeros_like(kept)[..., None]


def samples(draft: Draft, branches: int, memory: Sequences) -> Array:
    """K blocks drawn at T=1 from the first drafts, place by place, among each place's candidates: ``[B, K, γ-1]``."""
    xp = array_namespace(draft.candidates)
    size = (branches, draft.tokens.shape[1], 1)
    drawn = memory.send(np.stack([s.draft_rng().random(size) for s in draft.sequences]))
    odds = xp.astype(draft.probabilities, xp.float64)
    reached = xp.cumulative_sum(odds / xp.sum(odds, axis=-1, keepdims=True), axis=-1)
    below = xp.astype(reached[:, None, :, :-1] <= drawn, xp.int64)
    return xp.take_along_axis(draft.candidates[:, None], xp.sum(below, axis=-1, keepdims=True), axis=-1)[..., 0]


def behind(draft: Draft, kept: Array, tails: Array) -> Array:
    """All branches of each sequence ``[B, 1 + K, γ-1]``: the first block, then its beginnings with the tails behind them."""
    xp = array_namespace(kept)
    block = draft.tokens[:, None]
    places = xp.arange(block.shape[2], device=device(kept))
    return xp.concat([block, xp.where(places < kept[..., None], block, tails)], axis=1)


def _at(kept: Array, like: Array) -> Array:
    """Which places ``[B, K, γ-1]`` are those of the rejected tokens."""
    xp = array_namespace(kept)
    return xp.arange(like.shape[-1], device=device(kept)) == kept[..., None]
