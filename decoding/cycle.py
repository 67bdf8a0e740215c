"""One cycle: draft, choose boundaries, redraft, merge, verify, accept (docs/method.md). NumPy only.

Every sequence of a batch goes through the same steps; what a step costs is one call of an engine for all of them.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from decoding import acceptance, boundary
from decoding.engines import Bools, DrafterEngine, Floats, Ints, Pass, TargetEngine
from decoding.modes import MODES, Mode, ModeName, Redraft, Selection
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence

PREFILL_CHUNK = 128  # prompt tokens a target pass


@dataclass(frozen=True)
class Draft:
    """The first draft of one sequence.

    Attributes:
        candidates: ``[γ-1, A]`` likeliest tokens of places 1 … γ-1, best first. probabilities: as many.
    """

    candidates: Ints
    probabilities: Floats

    @property
    def tokens(self) -> list[int]:
        return self.candidates[:, 0].tolist()


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
        mode = MODES[mode_name]
        trees = [PrefixTree(s.anchor, branches) for s, branches in zip(sequences, self.draft(sequences, mode), strict=True)]
        verified = self.verify(sequences, trees)
        committed, rows = [], []
        for b, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):

            def choose(node: int, b: int = b, s: Sequence = sequence) -> int:
                return verified.choose(b, node, s.sampling, s.rng.random())

            nodes, tokens = acceptance.walk(tree, choose)
            count = sequence.commit(tokens)
            sequence.cycles += 1
            sequence.features = verified.features(b, nodes[:count])
            committed.append(tokens[:count])
            rows.append(nodes[:count])
        self.target.keep(rows)
        return committed

    def verify(self, sequences: Many[Sequence], trees: Many[PrefixTree]) -> Pass:
        """One target pass over the nodes of all trees."""
        n = max(len(tree) for tree in trees)
        token_ids = np.zeros((len(trees), n), dtype=np.int64)
        positions = np.zeros((len(trees), n), dtype=np.int64)
        mask = np.zeros((len(trees), n, n), dtype=bool)
        for b, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
            size = len(tree)
            token_ids[b, :size] = tree.tokens
            positions[b, :size] = sequence.position + np.array(tree.depths)
            mask[b, :size, :size] = tree.mask()
        return self.target.forward(token_ids, positions, mask)

    def draft(self, sequences: Many[Sequence], mode: Mode) -> list[list[list[int]]]:
        """The branches of each sequence: the first block, then what the mode adds to it."""
        if not mode.drafts:
            return [[] for _ in sequences]
        gamma = self.block_size
        first = self.drafters[0]
        blocks = np.full((len(sequences), gamma), first.mask_id, dtype=np.int64)
        blocks[:, 0] = [s.anchor for s in sequences]
        candidates, probabilities = self._run(first, sequences, blocks, fresh=True)
        drafts = [Draft(c[1:].copy(), p[1:].copy()) for c, p in zip(candidates, probabilities, strict=True)]
        if mode.branches is None:
            return [[draft.tokens] for draft in drafts]
        if mode.branches == "samples":
            return [[d.tokens, *self._samples(d, s)] for d, s in zip(drafts, sequences, strict=True)]
        selection = mode.selection or self.selection
        kept = [
            boundary.select(d.probabilities[:, 0], self.branches, selection, s.draft_rng()).tolist()
            for d, s in zip(drafts, sequences, strict=True)
        ]
        tails = self.tails(sequences, drafts, kept, mode)
        return [
            [draft.tokens] + [draft.tokens[:i] + tail for i, tail in zip(places, their_tails, strict=True)]
            for draft, places, their_tails in zip(drafts, kept, tails, strict=True)
        ]

    def tails(self, sequences: Many[Sequence], drafts: Many[Draft], kept: Many[list[int]], mode: Mode) -> list[list[list[int]]]:
        """What follows the kept tokens of each branch, up to the block's end: ``tails[b][j]`` has γ-1-kept[b][j] tokens."""
        length = self.block_size - 1
        if mode.branches == "runner_up":
            return [
                [[int(d.candidates[i, 1]), *d.tokens[i + 1 :]] for i in places] for d, places in zip(drafts, kept, strict=True)
            ]
        if mode.branches == "random":
            rngs = [s.draft_rng() for s in sequences]
            return [
                [rng.integers(self.vocabulary, size=length - i).tolist() for i in places]
                for rng, places in zip(rngs, kept, strict=True)
            ]
        if mode.branches == "fixed":
            return [[[0] * (length - i) for i in places] for places in kept]
        drafter = self.drafters[0 if mode.branches == "first" else 1]
        return self.redrafts(drafter, sequences, drafts, kept)

    def redrafts(
        self, drafter: DrafterEngine, sequences: Many[Sequence], drafts: Many[Draft], kept: Many[list[int]]
    ) -> list[list[list[int]]]:
        """Fill all branches of all sequences in one pass: K blocks a sequence, blind to each other (docs/method.md §3).

        A branch at i matters only if draft token i+1 is wrong, so an exclusive redraft may not say it again.
        """
        gamma, width = self.block_size, len(kept[0])
        blocks = np.full((len(sequences), width, gamma), drafter.mask_id, dtype=np.int64)
        for b, (sequence, draft, places) in enumerate(zip(sequences, drafts, kept, strict=True)):
            for j, i in enumerate(places):
                blocks[b, j, 0] = sequence.anchor
                blocks[b, j, 1 : i + 1] = draft.tokens[:i]
        candidates, _ = self._run(drafter, sequences, blocks.reshape(len(sequences), -1), fresh=drafter is not self.drafters[0])
        candidates = candidates.reshape(*blocks.shape, -1)
        tails = candidates[..., 0].tolist()
        for b, (draft, places) in enumerate(zip(drafts, kept, strict=True)):
            for j, i in enumerate(places):
                best, runner_up = candidates[b, j, i + 1, :2].tolist()
                refused = self.redraft == "exclusive" and best == draft.tokens[i]
                tails[b][j] = [runner_up if refused else best, *tails[b][j][i + 2 :]]
        return tails

    def _samples(self, draft: Draft, sequence: Sequence) -> list[list[int]]:
        """K blocks drawn at T=1 from the first draft, place by place, among each place's candidates."""
        odds = draft.probabilities.astype(np.float64)
        odds /= odds.sum(-1, keepdims=True)
        drawn = sequence.draft_rng().random((self.branches, len(odds), 1))
        index = (np.cumsum(odds, axis=-1) <= drawn).sum(-1).clip(max=odds.shape[1] - 1)
        return np.take_along_axis(draft.candidates[None], index[..., None], axis=-1)[..., 0].tolist()

    def _run(self, drafter: DrafterEngine, sequences: Many[Sequence], block_ids: Ints, *, fresh: bool) -> tuple[Ints, Floats]:
        """Run blocks of γ through a drafter; ``fresh`` if it has not seen the newly committed features yet."""
        gamma = self.block_size
        blocks = block_ids.shape[1] // gamma
        features = [s.features if fresh else None for s in sequences]
        starts = np.array([s.position for s in sequences], dtype=np.int64)
        positions: Ints = np.add.outer(starts, np.tile(np.arange(gamma), blocks))
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
