"""What the planner is told of a cycle, and what it says."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoding.sequence import Sequence


@dataclass
class Plan:
    """What a cycle does for the sequences in ``auto``.

    Attributes:
        drafted: which of them the first drafter is called for. branches: redraft of each of those; 0 is none.
        nodes: rows that each verifies, the anchor's among them; set by the last step, or at once where there is no other.
        where: whether drafts are thought of follows from it: how many sequences, and how sure their texts are.
        probing: whether it drafts or redrafts to find out.
        promised: tokens that its nodes' values sum to. expected: that it should commit.
        seconds: that it should take at the machine's usual pace. calls: of these, its engines' calls alone.
        pace: how many times as long it takes at the moment. looked: seconds for which texts were looked up, and it was planned.
    """

    drafted: list[int]
    branches: int = 0
    nodes: list[int] = field(default_factory=list)
    where: tuple[int, int] = (0, 0)
    probing: bool = False
    promised: float = 0.0
    expected: float = 0.0
    seconds: float = 0.0
    calls: float = 0.0
    pace: float = 1.0
    looked: float = 0.0

    @property
    def kind(self) -> str:
        """What is done: redraft, draft, verify what the text repeats, or decode plainly."""
        return "redraft" if self.branches else "draft" if self.drafted else "text" if max(self.nodes) > 1 else "plain"


@dataclass
class Situation:
    """What a plan depends on.

    Attributes:
        sequences: those in ``auto``. text: ``[b, N - 1]``, the values of what the text proposes for each.
        lags: ``[2][b]``, tokens that each drafter must catch up with.
        contexts: ``[b]``. others: rows of the target's pass that are not theirs. other_context: of those rows' sequences.
    """

    sequences: Many[Sequence]
    text: NDArray[np.float64]
    lags: Many[Many[int]]
    contexts: Many[int]
    others: int = 0
    other_context: int = 0

    @property
    def context(self) -> int:
        """Tokens in the caches of all."""
        return sum(self.contexts) + self.other_context


@dataclass(frozen=True)
class Bar:
    """What plain decoding takes for some time, and what more must bring.

    Attributes:
        until: the cycle. sequences: how many. others: rows of the pass that are not theirs.
        seconds: of a plain cycle. alone: of one without those rows. passes: of the target's call with 0, 1, … nodes beside.
        least: tokens that the first 1, 2, … nodes must be worth together. node: that one must be worth to be among the most
            valuable that pay, about.
    """

    until: int
    sequences: int
    others: int
    seconds: float
    alone: float
    passes: list[float]
    least: list[float]
    node: float
