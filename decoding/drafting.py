"""What each sequence's mode wants verified: drafts, redrafts and trees for a whole batch (docs/method.md §7)."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from decoding import best_first, branches, prefix_tree, sources
from decoding.drafts import Draft, Redrafts, first_draft, redraft
from decoding.engines import Array, TargetEngine
from decoding.follower import Follower
from decoding.modes import MODES, Mode, ModeName, Redraft, Selection
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence
from decoding.sources import Source
from decoding.text import Text


@dataclass
class Group:
    """Sequences of one mode, and what was drafted for them.

    Attributes:
        members: their places in the batch. anchors: ``[b]``. drafted: their first drafts, if the mode drafts.
    """

    mode: Mode
    members: list[int]
    sequences: list[Sequence]
    anchors: Array
    drafted: Draft | None = None
    redrafts: Redrafts | None = None

    @property
    def draft(self) -> Draft:
        assert self.drafted is not None
        return self.drafted


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
        rows: int,
        vocabulary: int,
        selection: Selection,
        redraft: Redraft,
    ) -> None:
        self.target, self.first, self.second = target, first, second
        self.mode, self.branches, self.rows, self.vocabulary = mode, branches, rows, vocabulary
        self.selection, self.redraft = selection, redraft
        self.text = Text()

    def followers(self, sequence: Sequence) -> list[Follower]:
        """The drafters that a sequence's mode can call."""
        mode = self._mode(sequence)
        return [f for f in (self.first if mode.drafts else None, self.second if mode.redrafts else None) if f]

    def close(self, sequence: Sequence) -> None:
        for follower in self.followers(sequence):
            follower.close(sequence)
        self.text.close(sequence)

    def reset(self) -> None:
        for part in (self.first, self.second, self.text):
            if part:
                part.reset()

    def trees(self, sequences: Many[Sequence]) -> PrefixTree:
        """The tree of each sequence, as its mode makes it. A drafter runs once for all modes that ask for the same of it."""
        anchors = self.target.send(np.array([s.anchor for s in sequences], dtype=np.int64))
        by_mode: dict[Mode, list[int]] = {}
        for b, sequence in enumerate(sequences):
            by_mode.setdefault(self._mode(sequence), []).append(b)
        groups = [
            Group(mode, members, [sequences[b] for b in members], _at(anchors, members)) for mode, members in by_mode.items()
        ]
        self._draft([group for group in groups if group.mode.drafts], anchors)
        self._redraft([group for group in groups if group.mode.redrafts], self.second)
        self._redraft([group for group in groups if group.mode.branches == "first"], self.first)
        trees = [self._tree(group) for group in groups]
        order = [b for group in groups for b in group.members]
        return prefix_tree.stack(trees).of([order.index(b) for b in range(len(sequences))])

    def learn(self, sequence: Sequence, said: Many[int]) -> None:
        """Take note of what the target said behind the anchor of a sequence's last tree."""
        self.text.learn(sequence, said)

    def _draft(self, groups: Many[Group], anchors: Array) -> None:
        """The first drafts, in one pass."""
        if groups:
            assert self.first is not None
            members = [b for group in groups for b in group.members]
            drafted = first_draft(self.first, [s for group in groups for s in group.sequences], _at(anchors, members))
            start = 0
            for group in groups:
                group.drafted = drafted.of(range(start, start := start + len(group.members)))

    def _redraft(self, groups: Many[Group], drafter: Follower | None) -> None:
        """Redrafts by one drafter, in one pass."""
        if groups:
            assert drafter is not None
            asked = [(group.draft, self._boundaries(group)) for group in groups]
            for group, redrafts in zip(groups, redraft(drafter, asked), strict=True):
                group.redrafts = redrafts

    def _boundaries(self, group: Group) -> Array:
        return branches.boundaries(group.draft, group.mode.selection or self.selection, self.branches, self.target)

    def _tree(self, group: Group) -> PrefixTree:
        if not group.mode.sources:
            return prefix_tree.merge(group.anchors, self._whole(group))
        return best_first.grow(group.anchors, self._sources(group), self.rows).tree

    def _sources(self, group: Group) -> list[Source]:
        """What feeds a best-first tree."""
        feeding = []
        if group.redrafts is not None:
            feeding.append(sources.redrafted(group.draft, group.redrafts))
        elif group.mode.drafts:
            feeding.append(sources.first(group.draft))
        if "text" in group.mode.sources:
            feeding.append(self.text.propose(group.sequences).sent(self.target))
        return feeding

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

    def _mode(self, sequence: Sequence) -> Mode:
        return MODES[sequence.mode or self.mode]


def _at(anchors: Array, members: Many[int]) -> Array:
    return array_namespace(anchors).stack([anchors[b] for b in members])
