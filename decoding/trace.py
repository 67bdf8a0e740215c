"""What became of a sequence cycle by cycle, for a request that asks to see it. Plain data: numbers, strings, lists."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from decoding.acceptance import Walk
from decoding.clock import Clock, Stage
from decoding.plan import Plan
from decoding.sequence import Sequence
from decoding.sources import FIRST, SECOND

CYCLES = 1000  # that a trace holds; later ones are counted


@dataclass(frozen=True)
class Choice:
    """What the planner chose for the sequences in ``auto``, as far as it concerns this one.

    Attributes:
        kind: of the whole cycle (``Plan.kind``). probing: whether it drafted to find out.
        drafted: whether for this sequence. branches: redraft of it. rows: that it verified.
        sequences: that were planned together; of all of them ``expected`` tokens in ``seconds``, and the tokens that ``came``.
    """

    kind: str
    probing: bool
    drafted: bool
    branches: int
    rows: int
    sequences: int
    expected: float
    seconds: float
    came: int


@dataclass(frozen=True)
class Cycle:
    """One cycle of a sequence.

    Attributes:
        began: seconds of some clock. laps: seconds of the cycle's stretches, which follow each other.
        batch: sequences that it advanced.
        tokens, parents, origins, values: of the tree's nodes (``PrefixTree``), the anchor first.
        boundaries: how many tokens of the first draft the redraft kept that a node is from; -1 if it is from none.
        accepted: nodes. said: tokens committed, one behind each of these, or fewer where the answer ends among them.
    """

    began: float
    laps: list[tuple[Stage, float]]
    batch: int
    tokens: list[int]
    parents: list[int]
    origins: list[int]
    boundaries: list[int]
    values: list[float]
    accepted: list[int]
    said: list[int]
    choice: Choice | None


@dataclass
class Trace:
    """The cycles of one sequence.

    Attributes:
        mode: that it is decoded in. cycles: the first ``CYCLES``. more_cycles, more_tokens: that came behind them.
    """

    mode: str
    cycles: list[Cycle] = field(default_factory=list)
    more_cycles: int = 0
    more_tokens: int = 0


def note(walks: Many[Walk], clock: Clock, planned: tuple[Many[Sequence], Plan] | None) -> None:
    """Add a cycle to the traces of the sequences that have one. planned: which of them ``auto`` planned, and how."""
    for walk in walks:
        trace = walk.sequence.trace
        if trace is None:
            continue
        if len(trace.cycles) >= CYCLES:
            trace.more_cycles += 1
            trace.more_tokens += len(walk.said)
            continue
        count = 1 + sum(parent >= 0 for parent in walk.parents)  # a tree is filled up behind its last node
        cycle = Cycle(
            began=clock.began,
            laps=list(clock.laps),
            batch=len(walks),
            tokens=walk.tokens[:count],
            parents=walk.parents[:count],
            origins=walk.origins[:count],
            boundaries=_boundaries(walk, count),
            values=walk.values[:count],
            accepted=walk.accepted,
            said=walk.said,
            choice=_choice(walk.sequence, {w.sequence: len(w.said) for w in walks}, *planned) if planned else None,
        )
        trace.cycles.append(cycle)


def _choice(sequence: Sequence, came: dict[Sequence, int], members: Many[Sequence], plan: Plan) -> Choice | None:
    if sequence not in members:
        return None
    own = members.index(sequence)
    drafted = own in plan.drafted
    return Choice(
        kind=plan.kind,
        probing=plan.probing,
        drafted=drafted,
        branches=plan.branches if drafted else 0,
        rows=plan.nodes[own],
        sequences=len(members),
        expected=plan.expected,
        seconds=plan.seconds * plan.pace,
        came=sum(came[member] for member in members),
    )


def _boundaries(walk: Walk, count: int) -> list[int]:
    """Of which redraft each node is: a path leaves the first draft at the first node that this does not propose."""
    left = [-1] * count  # depth of that node on the way to each
    for node in range(1, count):
        left[node] = left[walk.parents[node]]
        if left[node] < 0 and not walk.origins[node] & FIRST:
            left[node] = walk.depths[node]
    return [depth - 1 if origin & SECOND else -1 for depth, origin in zip(left, walk.origins, strict=False)]
