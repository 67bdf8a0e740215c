"""What each sequence's mode wants verified: drafts, redrafts and trees for a whole batch (docs/method.md §7)."""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_namespace

from decoding import best_first, branches, prefix_tree
from decoding.acceptance import Walk
from decoding.auto import Auto
from decoding.calibration import Calibration
from decoding.clock import Clock
from decoding.drafts import first_draft, redraft
from decoding.engines import Array, Costs, TargetEngine
from decoding.follower import Follower
from decoding.group import Group
from decoding.modes import MODES, Mode, ModeName, Redraft, Selection
from decoding.ngrams import NGrams
from decoding.plan import Plan
from decoding.planner import Planner
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence
from decoding.sources import FIRST, SECOND
from decoding.text import Text


class Drafting:
    """Turns sequences into trees. Arguments: ``cycle.Decoder``."""

    def __init__(
        self,
        target: TargetEngine,
        first: Follower | None,
        second: Follower | None,
        clock: Clock,
        *,
        mode: ModeName,
        branches: int,
        rows: int,
        vocabulary: int,
        selection: Selection,
        redraft: Redraft,
        costs: Costs | None,
        ngrams: NGrams | None,
    ) -> None:
        self.target, self.first, self.second, self.clock = target, first, second, clock
        self.mode, self.branches, self.rows, self.vocabulary = mode, branches, rows, vocabulary
        self.selection, self.redraft = selection, redraft
        self.text, self.ngrams = Text(), ngrams
        self.calibration = Calibration()
        self.planned = False
        self.auto: Auto | None = None
        if costs:
            planner = Planner(costs, first.block_size if first else 1, branches if second else 0, drafts=first is not None)
            self.auto = Auto(target, planner, self.text, ngrams, self.calibration, first, second)

    @property
    def plan(self) -> tuple[Many[Sequence], Plan] | None:
        """The sequences that ``auto`` planned in the last cycle, if any, and how."""
        return (self.auto.sequences, self.auto.plan) if self.auto and self.planned else None

    def followers(self, sequence: Sequence) -> list[Follower]:
        """The drafters that a sequence's mode can call."""
        mode = self._mode(sequence)
        return [f for f in (self.first if mode.drafts else None, self.second if mode.redrafts else None) if f]

    def close(self, sequence: Sequence) -> None:
        for follower in self.followers(sequence):
            follower.close(sequence)
        self.text.close(sequence)
        if self.auto:
            self.auto.planner.forget(sequence)

    def reset(self) -> None:
        for part in (self.first, self.second, self.text):
            if part:
                part.reset()

    def trees(self, sequences: Many[Sequence], others: int, other_context: int) -> PrefixTree:
        """The tree of each sequence, as its mode makes it. A drafter runs once for all modes that ask for the same of it.

        Args:
            others: rows that will be in the target's pass beside the trees. other_context: of their sequences.
        """
        anchors = self.target.send(np.array([s.anchor for s in sequences], dtype=np.int64))
        by_mode: dict[Mode, list[int]] = {}
        late = self._late(sequences)
        for b, sequence in enumerate(sequences):
            by_mode.setdefault(MODES["autoregressive"] if sequence in late else self._mode(sequence), []).append(b)
        members = by_mode.pop(MODES["auto"], [])
        groups = [Group.of(mode, some, sequences, anchors, self.branches) for mode, some in by_mode.items()]
        planned: list[Group] = []
        if members:
            assert self.auto is not None, "costs: found none, allowed with mode auto: what calls cost"
            beside = sum(self._most(group.mode) * len(group.members) for group in groups)
            other_context += sum(s.computed for group in groups for s in group.sequences)
            planned = self.auto.begin(members, sequences, anchors, others + beside, other_context)
        drafting = [group for group in (*groups, *planned) if group.mode.drafts]
        self._draft(drafting, anchors)
        if self.auto and planned:
            self.auto.consider_redrafts()
        self._redraft([group for group in drafting if group.mode.redrafts], self.second)
        self._redraft([group for group in drafting if group.mode.branches == "first"], self.first)
        trees = [self._tree(group) for group in groups]
        if self.auto and planned:
            trees += self.auto.cut([self._tree(group) for group in planned])
        groups, self.planned = groups + planned, bool(planned)
        order = [b for group in groups for b in group.members]
        return prefix_tree.stack(trees).of([order.index(b) for b in range(len(sequences))])

    def learn(self, walks: Many[Walk]) -> None:
        """Take note of what the target said of the last trees."""
        for walk in walks:
            self.text.learn(walk.sequence, walk.said)
            self.calibration.learn(walk)
        if self.auto and self.planned:
            self.auto.learn(walks, self.clock.cycle)

    def _late(self, sequences: Many[Sequence]) -> set[Sequence]:
        """Those that are decoded plainly in this cycle, because their drafters have more to catch up with than a call takes:
        nobody waits for several. Where a planner chooses, it knows what they would take."""
        fixed = [s for s in sequences if not self._mode(s).planned]
        late: set[Sequence] = set()
        for follower in (self.first, self.second):
            if follower:
                late.update(follower.catch_up([s for s in fixed if follower in self.followers(s)]))
        return late

    def _draft(self, groups: Many[Group], anchors: Array) -> None:
        """The first drafts, in one pass."""
        if groups:
            assert self.first is not None
            members = [b for group in groups for b in group.members]
            self.clock.mark("tree")
            drafted = first_draft(self.first, [s for group in groups for s in group.sequences], _at(anchors, members))
            start = 0
            for group in groups:
                group.drafted = drafted.of(range(start, start := start + len(group.members)))
            self.clock.mark("first_draft")

    def _redraft(self, groups: Many[Group], drafter: Follower | None) -> None:
        """Redrafts by one drafter, in one pass."""
        if groups:
            assert drafter is not None
            asked = [(group.draft, self._boundaries(group)) for group in groups]
            self.clock.mark("tree")
            for group, redrafts in zip(groups, redraft(drafter, asked), strict=True):
                group.redrafts = redrafts
            self.clock.mark("redraft")

    def _boundaries(self, group: Group) -> Array:
        return branches.boundaries(group.draft, group.mode.selection or self.selection, group.branches, self.target)

    def _tree(self, group: Group) -> PrefixTree:
        if not group.mode.sources:
            others = {"second": SECOND, "random": 0, "fixed": 0}.get(group.mode.branches or "", FIRST)
            return prefix_tree.merge(group.anchors, self._whole(group), (FIRST, others))
        if group.tree is not None:
            return group.tree
        factors: Any = self.calibration.factors
        if not is_numpy_namespace(array_namespace(group.anchors)):
            factors = self.target.send(np.array(factors, np.float32))
        feeding = group.sources(self.text, self.ngrams, self.target)
        if not feeding:  # n-grams alone, and no table of them
            return prefix_tree.merge(group.anchors, self._whole(group))
        return best_first.grow(group.anchors, feeding, group.nodes or self.rows, factors, couplings=group.couplings)

    def _whole(self, group: Group) -> Array:
        """The branches that a mode without a best-first tree verifies, ``[b, W, γ-1]``."""
        if not group.mode.drafts:
            return group.anchors[:, None, None][..., :0]
        draft, way = group.draft, group.mode.branches
        if way is None:
            return draft.tokens[:, None]
        if way == "samples":
            return branches.samples(draft, self.branches, self.target)
        if group.redrafts is not None:
            kept, tails = group.redrafts.kept, branches.redrafted(draft, group.redrafts, self.redraft)
        else:
            kept = self._boundaries(group)
            if way == "runner_up":
                tails = branches.runner_up(draft, kept)
            elif way == "random":
                tails = branches.random(draft, kept, self.vocabulary, self.target)
            else:
                tails = branches.fixed(kept)
        return branches.behind(draft, kept, tails)

    def _most(self, mode: Mode) -> int:
        """Rows that a sequence of a mode can verify."""
        if mode.sources:
            return self.rows
        return 1 + (self.first.block_size - 1 if self.first and mode.drafts else 0) * (1 + self.branches * bool(mode.branches))

    def _mode(self, sequence: Sequence) -> Mode:
        return MODES[sequence.mode or self.mode]


def _at(anchors: Array, members: Many[int]) -> Array:
    return array_namespace(anchors).stack([anchors[b] for b in members])
