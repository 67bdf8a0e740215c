"""The sequences in ``auto`` on their way through a cycle: the planner's steps, each when what it needs is there."""

import time
from collections.abc import Sequence as Many

import numpy as np
from array_api_compat import array_namespace, is_numpy_namespace
from numpy.typing import NDArray

from decoding import best_first, boundary, coupling, prefix_tree
from decoding.acceptance import Walk
from decoding.calibration import Calibration
from decoding.coupling import Coupling
from decoding.engines import Array, TargetEngine
from decoding.follower import Follower
from decoding.group import Group
from decoding.modes import DRAFTED, MODES
from decoding.ngrams import NGrams
from decoding.plan import Situation
from decoding.planner import Planner
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence
from decoding.sources import NGRAMS, TEXT, Proposer
from decoding.text import Text

LEAST = 0.8  # of what a node must be worth to pay: less than all, because sizes are a staircase and some come for less


class Auto:
    """Carries out what the planner plans. A cycle calls its methods in the order in which they stand here."""

    def __init__(
        self,
        target: TargetEngine,
        planner: Planner,
        text: Text,
        ngrams: NGrams | None,
        calibration: Calibration,
        first: Follower | None,
        second: Follower | None,
    ) -> None:
        self.target, self.planner, self.calibration = target, planner, calibration
        self.text, self.ngrams = text, ngrams
        self.first, self.second = first, second
        self.sequences: list[Sequence] = []  # of the cycle
        self.parts: list[tuple[Group, list[int]]] = []  # and their places among these
        self.spoke = False  # whether nodes were verified in the last cycle that cost no pass
        self.late = False  # whether a drafter went nearer to the target in this cycle, and drafted nothing

    def begin(
        self, members: Many[int], sequences: Many[Sequence], anchors: Array, others: int, other_context: int
    ) -> list[Group]:
        """Look the texts up, and choose the sequences to draft for.

        Args:
            members: which of ``sequences``, whose anchors are ``anchors``.
            others: rows of the target's pass that are not theirs. other_context: of the sequences whose they are.
        """
        self.late = False
        own = self.sequences = [sequences[b] for b in members]
        self.known = is_numpy_namespace(array_namespace(anchors))
        bar = self.planner.bar(len(own), sum(s.computed for s in own) + other_context, others)
        looks, least = self.planner.looks(), LEAST * bar.node
        for sequence in own if looks else ():
            self.text.take_in(sequence)
        began = time.perf_counter()
        couplings = [coupling.of(s) for s in own] if looks else []
        nodes, silent = [self.planner.reach] * len(own), not looks
        # Alone a tree is made as soon as a glance is taken; where they paid a moment ago they probably do now.
        if looks and len(own) > 1 and not self.spoke:
            worth = [self._worth(s, least, coupled) for s, coupled in zip(own, couplings, strict=True)]
            nodes = [count if values else 1 for count, values in zip(nodes, worth, strict=True)]
            silent = self.planner.hopeless(bar, [value for values in worth for value in values])
        if silent and (plan := self.planner.rests(bar)):
            group = Group.of(MODES["autoregressive"], list(members), sequences, anchors, 0)
            self.plan, self.parts = plan, [(group, list(range(len(own))))]
            plan.looked = looks * (time.perf_counter() - began)
            return [group]
        self.reach = self.planner.reach
        nothing = np.zeros((len(own), self.reach - 1))
        lags = [[f.lag(s) if f else 0 for s in own] for f in (self.first, self.second)]
        self.now = Situation(own, nothing, lags, [s.computed for s in own], others, other_context)
        here = np.array([s.anchor for s in own], dtype=np.int64)
        if silent:
            texts = prefix_tree.merge(here, here[:, None, None][..., :0])
        else:
            feeding: list[Proposer] = [self.ngrams.propose(own)] if self.ngrams else []
            feeding.append(self.text.propose(own, least))
            texts = best_first.grow(here, feeding, nodes, self.calibration.factors, least, couplings)
            self.now.text = self._values(texts)
        self.plan = self.planner.begin(self.now)
        self.plan.looked = looks * (time.perf_counter() - began)
        drafted = self._ready(self.plan.drafted)
        if self.plan.probing:
            self._probed("draft", self.plan.drafted[0], bool(drafted))
        self.plan.drafted = drafted
        alone = [b for b in range(len(own)) if b not in drafted]
        self.parts = []
        for mode, places in ((DRAFTED, drafted), (MODES["free"], alone)):
            if places:
                group = Group.of(mode, [members[b] for b in places], sequences, anchors, 0)
                group.nodes = self.reach
                if not mode.drafts:
                    group.tree = texts.of(places).mapped(self.target.send)
                self.parts.append((group, places))
        return [group for group, _ in self.parts]

    def _ready(self, places: list[int]) -> list[int]:
        """Those of the sequences there that the first drafter can draft for in a call. With others, further behind, it goes a
        call nearer to the target: nobody waits for several."""
        behind = self.first.catch_up([self.sequences[b] for b in places]) if self.first and places else []
        self.late = bool(behind)
        return [b for b in places if self.sequences[b] not in behind]

    def _probed(self, what: str, place: int, made: bool) -> None:
        """Whether a probe was made; if not, it is when its drafter has caught up, and not paid for again."""
        self.plan.probing = made
        if made:
            self.planner.awaited.pop(what, None)
        else:
            self.planner.awaited[what] = self.sequences[place]

    def _worth(self, sequence: Sequence, least: float, coupled: Coupling | None) -> list[float]:
        """What the nodes that cost no pass are worth, at a glance; of what is worth less than ``least``, not all."""
        found = self.calibration.corrected(self.text.worth(sequence, least, coupled), TEXT)
        if self.ngrams:
            found += self.calibration.corrected(self.ngrams.worth(sequence, least, coupled), NGRAMS)
        return found

    def consider_redrafts(self) -> None:
        """Choose the branches of a redraft, now that there are first drafts. On a device nobody knows what they are."""
        if not self.plan.drafted:
            return
        group, branches = self.parts[0][0], self.planner.branches
        self.before = self.planner.promised(self.now, self.plan)
        shares = np.arange(1, branches + 1) / max(branches, 1)
        if self.known:
            feeding = group.sources(self.text, self.ngrams, self.target)
            factors = self.calibration.factors
            group.tree = best_first.grow(group.anchors, feeding, self.reach, factors, couplings=group.couplings)
            self.before[self.plan.drafted] = self._values(group.tree)
            self.planner.saw_drafts(self.now, self.plan, self.before)
            rejected = -np.sort(-boundary.rejection_probabilities(group.draft.probabilities[..., 0]), axis=-1)
            shares = (np.cumsum(rejected, axis=-1) / (rejected.sum(-1, keepdims=True) + 1e-9)).mean(0)
        probing = self.plan.probing
        self.planner.redraft(self.now, self.plan, self.before, shares)
        if self.plan.branches and self.second and self.second.catch_up(group.sequences):
            self.plan.branches, self.late = 0, True
        if self.plan.probing and not probing:
            self._probed("redraft", self.plan.drafted[0], self.plan.branches > 0)
        if self.plan.branches:
            self.share = float(shares[self.plan.branches - 1])
            group.mode, group.branches, group.tree = MODES["all"], self.plan.branches, None

    def cut(self, trees: Many[PrefixTree]) -> list[PrefixTree]:
        """Leave of the trees of the groups of ``begin`` the nodes that are worth their time."""
        if self.plan.nodes:  # nothing was left to choose
            return list(trees)
        values = self.planner.promised(self.now, self.plan)
        for (group, places), tree in zip(self.parts, trees, strict=True):
            if self.known:
                values[places] = self._values(tree)
            if self.known and group.mode.redrafts:
                self.planner.saw_redrafts(self.plan, self.before, values, self.share)
        self.planner.finish(self.now, self.plan, values)
        return [tree.first([self.plan.nodes[b] for b in places]) for (_, places), tree in zip(self.parts, trees, strict=True)]

    def learn(self, walks: Many[Walk], seconds: float) -> None:
        """What came of the plan. walks: of the whole batch. seconds: that the cycle took."""
        self.spoke = self.plan.kind == "text"
        own = {walk.sequence: walk for walk in walks}
        if not self.known and self.plan.drafted:
            values = self.now.text.copy()
            for b in self.plan.drafted:
                seen = own[self.sequences[b]].values[1:]
                values[b, : len(seen)] = seen
            if self.plan.branches:
                self.planner.saw_redrafts(self.plan, self.before, values, self.share)
            else:
                self.planner.saw_drafts(self.now, self.plan, values)
        came = sum(len(own[s].said) for s in self.sequences)
        alone = len(own) == len(self.sequences) and not self.late
        self.planner.learn(self.plan, came, seconds if alone else None)

    def _values(self, tree: PrefixTree) -> NDArray[np.float64]:
        """Of the nodes but the anchor, ``[b, reach - 1]``."""
        values = np.zeros((len(tree.counts), self.reach - 1))
        values[:, : tree.values.shape[1] - 1] = tree.values[:, 1:]
        return values
