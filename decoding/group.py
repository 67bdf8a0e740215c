"""Sequences of a batch whose trees are made alike."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

from array_api_compat import array_namespace

from decoding.drafts import Draft, Redrafts
from decoding.engines import Array
from decoding.modes import Mode
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence
from decoding.sources import Source


@dataclass
class Group:
    """Sequences whose trees are made alike, and what was drafted for them.

    Attributes:
        members: their places in the batch. anchors: ``[b]``. branches: redrafts of each.
        nodes: of a tree, at most; 0 for as many as all modes have. text: what their texts propose, if it was looked up.
        drafted: their first drafts, if the mode drafts. tree: if it was made.
    """

    mode: Mode
    members: list[int]
    sequences: list[Sequence]
    anchors: Array
    branches: int
    nodes: int = 0
    text: Source | None = None
    tree: PrefixTree | None = None
    drafted: Draft | None = None
    redrafts: Redrafts | None = None

    @classmethod
    def of(cls, mode: Mode, members: list[int], sequences: Many[Sequence], anchors: Array, branches: int) -> "Group":
        """Of some members of a batch."""
        own = array_namespace(anchors).stack([anchors[b] for b in members])
        return cls(mode, members, [sequences[b] for b in members], own, branches)

    @property
    def draft(self) -> Draft:
        assert self.drafted is not None
        return self.drafted
