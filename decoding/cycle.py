"""One cycle: draft, choose boundaries, redraft, merge, verify, accept (docs/method.md).

All sequences of a batch go through it as one array, by the Python array API standard: NumPy's where an engine works in the
host's memory, PyTorch's on a device. There nothing is waited for but what was accepted, at the end of the cycle.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from decoding import acceptance, boundary, prefix_tree
from decoding.engines import Array, Bools, DrafterEngine, Ints, Pass, TargetEngine
from decoding.modes import MODES, Mode, ModeName, Redraft, Selection
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence

PREFILL_CHUNK = 128  # prompt tokens a target pass


@dataclass(frozen=True)
class Draft:
    """The first drafts.

    Attributes:
        anchors: ``[B]``. candidates: ``[B, γ-1, A]`` likeliest tokens of places 1 … γ-1, best first. probabilities: as many.
    """

    anchors: Array
    candidates: Array
    probabilities: Array

    @property
    def tokens(self) -> Array:
        """``[B, γ-1]``."""
        return self.candidates[..., 0]


class Decoder:
    """Runs cycles over the running sequences.

    Args:
        first, second: None where only ``autoregressive`` is asked for.
        block_size: γ. branches: K.
        vocabulary: V, from which ``random_redraft`` draws.
    """

    def __init__(
        self,
        target: TargetEngine,
        first: DrafterEngine | None,
        second: DrafterEngine | None,
        *,
        block_size: int,
        branches: int,
        vocabulary: int,
        selection: Selection = "confidence",
        redraft: Redraft = "exclusive",
    ) -> None:
        self.target = target
        self.drafters = [drafter for drafter in (first, second) if drafter is not None]
        self.block_size, self.branches, self.vocabulary = block_size, branches, vocabulary
        self.selection, self.redraft = selection, redraft

    def join(self, sequence: Sequence, mode: ModeName, place: int | None = None) -> None:
        """Take a sequence in, behind the running ones or in the place of one of them.

        All of its prompt enters the caches but the last token, which is its first anchor.
        """
        before = np.array(sequence.tokens[:-1], dtype=np.int64)
        for start in range(0, len(before), PREFILL_CHUNK):
            chunk = before[None, start : start + PREFILL_CHUNK]
            n = chunk.shape[1]
            features = self.target.prefill(chunk, np.arange(start, start + n)[None], np.tri(n, dtype=bool)[None])
            for drafter in self._drafting(MODES[mode]):
                drafter.prefill(features)
        for engine in (self.target, *self.drafters):
            engine.join(place)

    def leave(self, sequence: int) -> None:
        """Let a running sequence go; those behind it move up."""
        for engine in (self.target, *self.drafters):
            engine.leave(sequence)

    def cycle(self, sequences: Many[Sequence], mode_name: ModeName) -> list[list[int]]:
        """Advance every sequence by at least one token. Returns the tokens committed to each."""
        anchors = self.target.send(np.array([s.anchor for s in sequences], dtype=np.int64))
        tree = prefix_tree.merge(anchors, self.draft(sequences, anchors, MODES[mode_name]))
        verified = self.verify(sequences, tree)
        sampling = [s.sampling for s in sequences]
        uniforms = self.target.send(np.stack([s.uniforms(tree.height + 1) for s in sequences]))
        walked = acceptance.walk(tree, lambda depth, nodes: verified.choose(nodes, sampling, uniforms[:, depth]))
        all_nodes, all_tokens = self.target.read(array_namespace(anchors).stack(walked))
        committed, rows = [], []
        for b, (sequence, nodes, tokens) in enumerate(zip(sequences, all_nodes, all_tokens, strict=True)):
            accepted = nodes[nodes >= 0].tolist()
            chosen = tokens[: len(accepted)].tolist()
            count = sequence.commit(chosen)
            sequence.cycles += 1
            sequence.features = verified.features(b, accepted[:count])
            committed.append(chosen[:count])
            rows.append(accepted[:count])
        self.target.keep(rows)
        return committed

    def verify(self, sequences: Many[Sequence], tree: PrefixTree) -> Pass:
        """One target pass over the nodes of all trees."""
        starts = self.target.send(_positions(sequences))
        return self.target.forward(tree.tokens, starts[:, None] + tree.depths, tree.mask)

    def draft(self, sequences: Many[Sequence], anchors: Array, mode: Mode) -> Array:
        """The branches of each sequence, ``[B, W, γ-1]``: the first block, then what the mode adds to it. If it drafts nothing:
        one branch of no tokens."""
        xp = array_namespace(anchors)
        if not mode.drafts:
            return anchors[:, None, None][..., :0]
        first = self.drafters[0]
        blocks = np.full((len(sequences), self.block_size), first.mask_id, dtype=np.int64)
        blocks[:, 0] = [s.anchor for s in sequences]
        candidates, probabilities = self._run(first, sequences, blocks, fresh=True)
        draft = Draft(anchors, *(xp.asarray(made[:, 1:], copy=True) for made in (candidates, probabilities)))
        block = draft.tokens[:, None]
        if mode.branches is None:
            return block
        if mode.branches == "samples":
            return xp.concat([block, self._samples(draft, sequences)], axis=1)
        kept = self.boundaries(sequences, draft, mode.selection or self.selection)
        places = xp.arange(self.block_size - 1, device=device(anchors))
        branches = xp.where(places < kept[..., None], block, self.tails(sequences, draft, kept, mode))
        return xp.concat([block, branches], axis=1)

    def boundaries(self, sequences: Many[Sequence], draft: Draft, selection: Selection) -> Array:
        """How many draft tokens each branch keeps, ``[B, K]``."""
        if selection == "confidence":
            return boundary.likeliest(draft.probabilities[..., 0], self.branches)
        chosen = [boundary.anywhere(self.block_size - 1, self.branches, s.draft_rng()) for s in sequences]
        return self.target.send(np.stack(chosen))

    def tails(self, sequences: Many[Sequence], draft: Draft, kept: Array, mode: Mode) -> Array:
        """What each branch says behind the tokens that it keeps, ``[B, K, γ-1]``; void at the kept places."""
        xp = array_namespace(kept)
        if mode.branches == "runner_up":
            places = xp.arange(self.block_size - 1, device=device(kept))
            return xp.where(places == kept[..., None], draft.candidates[:, None, :, 1], draft.tokens[:, None])
        if mode.branches == "random":
            size = (kept.shape[1], self.block_size - 1)
            return self.target.send(np.stack([s.draft_rng().integers(self.vocabulary, size=size) for s in sequences]))
        if mode.branches == "fixed":
            return xp.zeros_like(kept)[..., None]
        return self.redrafts(self.drafters[0 if mode.branches == "first" else 1], sequences, draft, kept)

    def redrafts(self, drafter: DrafterEngine, sequences: Many[Sequence], draft: Draft, kept: Array) -> Array:
        """Fill all branches of all sequences in one pass: K blocks a sequence, blind to each other (docs/method.md §3).

        A branch at i matters only if draft token i+1 is wrong, so an exclusive redraft may not say it again.
        """
        xp = array_namespace(kept)
        whole = xp.concat([draft.anchors[:, None], draft.tokens], axis=1)[:, None]  # [B, 1, γ]
        places = xp.arange(self.block_size, device=device(kept))
        blocks = xp.where(places <= kept[..., None], whole, drafter.mask_id)  # [B, K, γ]
        flat = xp.reshape(blocks, (len(sequences), -1))
        candidates, _ = self._run(drafter, sequences, flat, fresh=drafter is not self.drafters[0])
        candidates = xp.reshape(candidates, (*blocks.shape, -1))[:, :, 1:]
        best = candidates[..., 0]
        if self.redraft == "free":
            return best
        refused = (places[:-1] == kept[..., None]) & (best == draft.tokens[:, None])
        return xp.where(refused, candidates[..., 1], best)

    def _samples(self, draft: Draft, sequences: Many[Sequence]) -> Array:
        """K blocks drawn at T=1 from the first drafts, place by place, among each place's candidates: ``[B, K, γ-1]``."""
        xp = array_namespace(draft.candidates)
        size = (self.branches, self.block_size - 1, 1)
        drawn = self.target.send(np.stack([s.draft_rng().random(size) for s in sequences]))
        odds = xp.astype(draft.probabilities, xp.float64)
        reached = xp.cumulative_sum(odds / xp.sum(odds, axis=-1, keepdims=True), axis=-1)
        below = xp.astype(reached[:, None, :, :-1] <= drawn, xp.int64)
        return xp.take_along_axis(draft.candidates[:, None], xp.sum(below, axis=-1, keepdims=True), axis=-1)[..., 0]

    def _run(self, drafter: DrafterEngine, sequences: Many[Sequence], block_ids: Array, *, fresh: bool) -> tuple[Array, Array]:
        """Run blocks of γ through a drafter; ``fresh`` if it has not seen the newly committed features yet."""
        gamma = self.block_size
        blocks = block_ids.shape[1] // gamma
        features = [s.features if fresh else None for s in sequences]
        positions: Ints = np.add.outer(_positions(sequences), np.tile(np.arange(gamma), blocks))
        own: Bools = np.kron(np.eye(blocks, dtype=bool), np.ones((gamma, gamma), dtype=bool))
        mask = np.broadcast_to(own, (len(sequences), *own.shape))
        return drafter.forward(features, block_ids, positions, mask)

    def reset(self) -> None:
        """Let all sequences go, the one that was joining too."""
        for engine in (self.target, *self.drafters):
            engine.reset()

    def _drafting(self, mode: Mode) -> list[DrafterEngine]:
        """The drafters that a mode feeds: the second one only where it redrafts."""
        return self.drafters[: 0 if not mode.drafts else 2 if mode.branches == "second" else 1]


def _positions(sequences: Many[Sequence]) -> NDArray[np.int64]:
    """Of the anchors, ``[B]``."""
    return np.array([s.position for s in sequences], dtype=np.int64)
