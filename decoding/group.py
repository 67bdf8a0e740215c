"""Sequences of a batch whose trees are made alike."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from array_api_compat import array_namespace, is_numpy_namespace

from decoding import coupling, sources
from decoding.coupling import Coupling
from decoding.drafts import Draft, Redrafts
from decoding.engines import Array, Sequences
from decoding.modes import Mode
from decoding.ngrams import NGrams
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence
from decoding.sources import Proposer
from decoding.text import Text


@dataclass
class Group:
    """Sequences whose trees are made alike, and what was drafted for them.

    Attributes:
        members: their places in the batch. anchors: ``[b]``. branches: redrafts of each.
        nodes: of a tree, at most; 0 for as many as all modes have.
        drafted: their first drafts, if the mode drafts. tree: if it was made.
    """

    mode: Mode
    members: list[int]
    sequences: list[Sequence]
    anchors: Array
    branches: int
    nodes: int = 0
    tree: PrefixTree | None = None
    drafted: Draft | None = None
    redrafts: Redrafts | None = None

    @classmethod
    def of(cls, mode: Mode, members: list[int], sequences: Many[Sequence], anchors: Array, branches: int) -> "Group":
        """Of some members of a batch."""
        all_of_them = members == list(range(len(sequences)))
        own = anchors if all_of_them else array_namespace(anchors).stack([anchors[b] for b in members])
        return cls(mode, members, [sequences[b] for b in members], own, branches)

    @property
    def draft(self) -> Draft:
        assert self.drafted is not None
        return self.drafted

    @cached_property
    def couplings(self) -> list[Coupling | None]:
        """Of its sequences: more than one tree of a cycle may be grown by them."""
        return [coupling.of(sequence) for sequence in self.sequences]

    def sources(self, text: Text, ngrams: NGrams | None, memory: Sequences) -> list[Any]:
        """What feeds a best-first tree: ``Proposer`` in the host's memory, ``Source`` on a device."""
        feeding: list[Any] = []
        host = is_numpy_namespace(array_namespace(self.anchors))
        if self.redrafts is not None:
            feeding.append(sources.redrafted(self.draft, self.redrafts))
        elif self.mode.drafts:
            feeding.append(sources.first(self.draft))
        looked_up: list[Proposer] = []
        if ngrams and "ngrams" in self.mode.sources:
            looked_up.append(ngrams.propose(self.sequences))
        if "text" in self.mode.sources:
            looked_up.append(text.propose(self.sequences))
        return feeding + [each if host else sources.spread(each, len(self.sequences)).sent(memory) for each in looked_up]
