"""What each sequence's mode wants verified: drafts, redrafts and trees for a whole batch (docs/method.md §7)."""

from collections.abc import Sequence as Many

import numpy as np
from array_api_compat import array_namespace

from decoding import branches, prefix_tree
from decoding.drafts import Draft, Redrafts, first_draft, redraft
from decoding.engines import Array, TargetEngine
from decoding.follower import Follower
from decoding.modes import MODES, Mode, ModeName, Redraft, Selection
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence


class Drafting:
    """Turns sequences into trees. Arguments: ``cycle.Decoder``."""

    def __init__(
        self,
        target: TargetEngine,
        first: Follower | None,
        second: Follower | None,
        *,
        mode: ModeName,
        branches: int,
        vocabulary: int,
        selection: Selection,
        redraft: Redraft,
    ) -> None:
        self.target, self.first, self.second = target, first, second
        self.mode, self.branches, self.vocabulary = mode, branches, vocabulary
        self.selection, self.redraft = selection, redraft

    def followers(self, sequence: Sequence) -> list[Follower]:
        """The drafters that a sequence's mode can call."""
        mode = MODES[sequence.mode or self.mode]
        return [f for f in (self.first if mode.drafts else None, self.second if mode.branches == "second" else None) if f]

    def reset(self) -> None:
        for follower in (self.first, self.second):
            if follower:
                follower.reset()

    def trees(self, sequences: Many[Sequence]) -> PrefixTree:
        """The tree of each sequence, as its mode makes it. A drafter runs once for all modes that ask for the same of it."""
        anchors = self.target.send(np.array([s.anchor for s in sequences], dtype=np.int64))
        modes: dict[ModeName, list[int]] = {}
        for b, sequence in enumerate(sequences):
            modes.setdefault(sequence.mode or self.mode, []).append(b)
        drafted = [b for name, rows in modes.items() if MODES[name].drafts for b in rows]
        drafts: dict[ModeName, Draft] = {}
        if drafted:
            assert self.first is not None
            made = first_draft(self.first, [sequences[b] for b in drafted], self._at(anchors, drafted))
            drafts = {name: made.of([drafted.index(b) for b in rows]) for name, rows in modes.items() if MODES[name].drafts}
        kept = {name: self._boundaries(MODES[name], draft) for name, draft in drafts.items() if MODES[name].branches}
        redrafts: dict[ModeName, Redrafts] = {}
        for who, drafter in (("first", self.first), ("second", self.second)):
            asking = [name for name in kept if MODES[name].branches == who]
            if asking:
                assert drafter is not None
                redrafts |= zip(asking, redraft(drafter, [(drafts[name], kept[name]) for name in asking]), strict=True)
        trees = []
        for name, rows in modes.items():
            own = self._at(anchors, rows)
            ways = own[:, None, None][..., :0]
            if name in drafts:
                ways = self._branches(MODES[name], drafts[name], kept.get(name), redrafts.get(name))
            trees.append(prefix_tree.merge(own, ways))
        order = [b for rows in modes.values() for b in rows]
        return prefix_tree.stack(trees).of([order.index(b) for b in range(len(sequences))])

    def _boundaries(self, mode: Mode, draft: Draft) -> Array:
        return branches.boundaries(draft, mode.selection or self.selection, self.branches, self.target)

    def _branches(self, mode: Mode, draft: Draft, kept: Array | None, redrafts: Redrafts | None) -> Array:
        """The branches that a mode verifies, ``[B, W, γ-1]``."""
        if mode.branches is None:
            return draft.tokens[:, None]
        if mode.branches == "samples":
            return branches.samples(draft, self.branches, self.target)
        if redrafts is not None:
            tails = branches.redrafted(draft, redrafts, self.redraft)
        elif mode.branches == "runner_up":
            tails = branches.runner_up(draft, kept)
        elif mode.branches == "random":
            tails = branches.random(draft, kept, self.vocabulary, self.target)
        else:
            tails = branches.fixed(kept)
        return branches.behind(draft, kept, tails)

    def _at(self, anchors: Array, rows: Many[int]) -> Array:
        return array_namespace(anchors).stack([anchors[b] for b in rows])
