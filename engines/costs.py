"""What a call of each engine takes on this machine: measured at first start, kept beside the build, corrected while serving.

``python -m engines.costs build/`` measures if need be, prints the tables and plots them.

A call of R rows over S sequences with X tokens in their caches takes ``rows(R) + X · context(R / S) + S · sequence``. The first
is a staircase, on some machines not even a rising one: it is looked up between measured sizes, and nothing is fitted to it.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.engine import EngineError
from engines.memory import use_large_pages

Seconds = NDArray[np.float64]

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)  # rows that are measured
LONG, SHORT = 768, 64  # tokens in the cache while they are
TURNS = 6  # of the calls, those of few rows in all of them
TOGETHER = 4  # sequences of the call that says what a further one takes
PACE = 0.06  # weight of a call in what is known of how slow the machine is at the moment, which all calls share
REACH = 0.02  # and in the correction of its own size
LEARNED = 8  # calls of which it learns at once
LOOKED_UP = 512  # rows; larger calls are reckoned from there
FORM = 5  # of the file


@dataclass
class Table:
    """Of one engine.

    Attributes:
        rows: measured sizes. seconds: of a call of as many, one sequence, short context.
        widths: sizes measured with a long context too. context: seconds for each token in the cache at these.
        sequence: seconds for each further sequence.
        steps: numbers of rows up to which smaller calls are filled; of an engine that takes any number, none.
        correction: what calls took, of what the table says, by measured size.
    """

    rows: list[int]
    seconds: list[float]
    widths: list[int]
    context: list[float]
    sequence: float
    steps: list[int] = field(default_factory=list)
    correction: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.correction = self.correction or [1.0] * len(self.rows)
        self._sizes, self._correction = np.array(self.rows, float), np.array(self.correction)
        rows = np.arange(LOOKED_UP + 1)
        steps = np.array([0, *self.steps, LOOKED_UP])
        self._filled = np.where(rows <= steps[-2], steps[np.searchsorted(steps, rows)], rows)
        self._base = np.interp(self._filled, self._sizes, self.seconds)
        beyond = np.maximum(self._filled - self.rows[-1], 0)
        self._base += beyond * (self.seconds[-1] / self.rows[-1])
        self._widths, self._context = np.array(self.widths, float), np.array(self.context)
        # Sizes a third larger or smaller learn with one.
        distance = np.abs(np.log((self._sizes + 1) / (self._filled[:, None] + 1)))
        self._near = REACH * np.exp(-((distance / 0.3) ** 2))
        self._factor = np.interp(self._filled, self._sizes, self._correction)
        self._seen: list[tuple[int, float]] = []  # calls, and what they took, of what was expected

    def __call__(self, rows: NDArray[np.int64], sequences: int, context: int) -> Seconds:
        """Seconds of calls of ``rows`` each, an int64 array of any shape.

        Calls larger than any measured are reckoned by their last step.
        """
        known = np.minimum(rows, LOOKED_UP)
        each = np.interp(known / max(sequences, 1), self._widths, self._context)
        seconds: Seconds = self._factor[known] * (self._base[known] + context * each + max(sequences - 1, 0) * self.sequence)
        return seconds * (np.maximum(rows, LOOKED_UP) / LOOKED_UP)

    def once(self, rows: int, sequences: int, context: int) -> float:
        """Seconds of one call. Beside every call of an engine: on its own an array's way takes a hundredth of that call."""
        known = min(rows, LOOKED_UP)
        each = float(np.interp(known / max(sequences, 1), self._widths, self._context))
        seconds = float(self._base[known]) + context * each + max(sequences - 1, 0) * self.sequence
        return float(self._factor[known]) * seconds * (max(rows, LOOKED_UP) / LOOKED_UP)

    def correct(self, rows: int, ratio: float) -> None:
        """A call took so many times as long as was expected."""
        self._seen.append((min(rows, LOOKED_UP), ratio))
        if len(self._seen) == LEARNED:
            for size, took in self._seen:
                self._correction *= 1 + self._near[size] * (took - 1)
            self._correction = np.clip(self._correction, 0.2, 5.0)
            self._factor = np.interp(self._filled, self._sizes, self._correction)
            self._seen.clear()


class Costs:
    """Contract: ``decoding/engines.py``. ``tables``: of ``target`` and, where there are drafters, ``first`` and ``second``."""

    def __init__(self, tables: dict[str, Table]) -> None:
        self.tables, self.pace = tables, 1.0

    def target(self, rows: NDArray[np.int64], sequences: int, context: int) -> Seconds:
        return self.tables["target"](rows, sequences, context)

    def first(self, rows: int, sequences: int, context: int) -> float:
        return self.tables["first"].once(rows, sequences, context)

    def second(self, rows: int, sequences: int, context: int) -> float:
        return self.tables["second"].once(rows, sequences, context)

    def observe(self, engine: str, rows: int, sequences: int, context: int, seconds: float) -> None:
        table = self.tables[engine]
        # One that was held up by something else counts as twice what was expected, at most.
        ratio = min(max(seconds / max(self.pace * table.once(rows, sequences, context), 1e-6), 0.5), 2.0)
        self.pace = min(max(self.pace * (1 + PACE * (ratio - 1)), 0.2), 5.0)
        table.correct(rows, ratio)


def machine() -> str:
    """This machine, for a file of costs to be told from another's."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_bf16") if f" {flag} " in f"{flags} "]
        model = f"{name} ({' '.join(known)})"
    except (OSError, StopIteration):
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def load(file: Path, identity: dict[str, Any]) -> Costs | None:
    """The costs that a file holds, if it is whole and of these engines on this machine."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["identity"] != identity:
            return None
        return Costs({name: Table(**table) for name, table in stored["tables"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(file: Path, identity: dict[str, Any], costs: Costs) -> None:
    """Write it whole or not at all. A folder that cannot be written to is none of serving's business."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    content = {"identity": identity, "tables": {name: asdict(table) for name, table in costs.tables.items()}}
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        print(f"costs are not kept: {error}", file=sys.stderr)


def _fit(engine: Any) -> Callable[[int], int]:
    """How many rows a call of so many is filled up to."""
    fit: Callable[[int], int] = getattr(engine, "fit", lambda rows: rows)
    return fit


def steps(engine: Any) -> list[int]:
    """Numbers of rows up to which smaller calls are filled; none where an engine takes any number."""
    fit = getattr(engine, "fit", None)
    return sorted({fit(n) for n in range(1, 65)}) if fit else []


def measure(target: Any, drafters: Sequence[Any], width: int, most: int, say: Callable[[str], None] = print) -> Costs:
    """Time the engines.

    Args:
        target, drafters: as ``BuildDirectory.load`` gives them, with no sequence open.
        width: F, of the features. most: tokens that a sequence may hold.
    """
    began = time.monotonic()
    _prepare([target, *drafters], say)
    long = min(LONG, most - max(SIZES) - 1)
    tables = {"target": _table(_TargetCalls(target, most), long)}
    say(f"costs: the target is measured, {time.monotonic() - began:.0f} s")
    for name, drafter in zip(("first", "second"), drafters, strict=False):
        tables[name] = _table(_DrafterCalls(drafter, width, most), long)
        say(f"costs: the {name} drafter is measured, {time.monotonic() - began:.0f} s")
    return Costs(tables)


def meet(target: Any, drafters: Sequence[Any], width: int, most: int, say: Callable[[str], None] = print) -> None:
    """Make the calls that every answer will make, so that the first answer does not wait for what happens only once."""
    _prepare([target, *drafters], say)
    every: list[Any] = [_TargetCalls(target, most), *(_DrafterCalls(drafter, width, most) for drafter in drafters)]
    for calls in every:
        one = calls.open(1)
        fit = _fit(calls.engine)
        for n in sorted({fit(size) for size in SIZES if size <= 32}):
            calls.call([one], n)
        calls.engine.reset()


def _prepare(engines: Sequence[Any], say: Callable[[str], None]) -> None:
    began = time.monotonic()
    usual = [engine.prepare for engine in engines if hasattr(engine, "prepare")]
    for prepare in usual:
        prepare()
    if usual:
        use_large_pages()  # of all engines at once
        say(f"engines: compiled for the usual numbers of rows, {time.monotonic() - began:.0f} s")


class _TargetCalls:
    def __init__(self, target: Any, most: int) -> None:
        self.engine, self.most = target, most

    def open(self, number: int) -> int:
        # Of its own beginning, or it would share another's blocks, and end sooner than asked.
        return self.engine.open([number, *[0] * (self.most - 1)], self.most)

    def fill(self, sequence: int, rows: int) -> None:
        """Take in so many tokens."""
        while rows > 0:
            n = min(rows, 128)
            self.call([sequence], n)
            self.engine.keep([range(n)])
            rows -= n

    def call(self, sequences: Sequence[int], n: int) -> None:
        batch = len(sequences)
        starts = np.array([self.engine.length(sequence) for sequence in sequences])
        ids = self.engine.send(np.ones((batch, n), np.int64))
        positions = self.engine.send(starts[:, None] + np.arange(n))
        mask = self.engine.send(np.broadcast_to(np.tri(n, dtype=bool), (batch, n, n)).copy())
        made = self.engine.forward(sequences, ids, positions, mask, [n] * batch)
        nodes, uniforms = self.engine.send(np.zeros(batch, np.int64)), self.engine.send(np.zeros(batch))
        self.engine.read(made.choose(nodes, [_GREEDY] * batch, uniforms))


class _DrafterCalls:
    def __init__(self, drafter: Any, width: int, most: int) -> None:
        self.engine, self.width, self.most = drafter, width, most
        self.least: int = getattr(drafter, "least", 0)

    def open(self, number: int) -> int:
        return self.engine.open([number, *[0] * (self.most - 1)], self.most)

    def fill(self, sequence: int, rows: int) -> None:
        while rows > 0:
            m = min(rows, 128)
            none = np.zeros((1, 0), np.int64)
            features = self.engine.send(np.ones((m, self.width), np.float32))
            self.engine.forward([sequence], [features], none, none, np.zeros((1, 0, 0), bool))
            rows -= m

    def call(self, sequences: Sequence[int], n: int) -> None:
        batch = len(sequences)
        n -= self.least if n > self.least else 0  # rows that it has anyway
        starts = np.array([self.engine.length(sequence) for sequence in sequences])
        none = self.engine.send(np.zeros((0, self.width), np.float32))
        ids = self.engine.send(np.full((batch, n), self.engine.mask_id))
        mask = np.ones((batch, n, n), bool)
        made, _ = self.engine.forward(sequences, [none] * batch, ids, starts[:, None] + np.arange(n), mask)
        self.engine.read(made)


@dataclass(frozen=True)
class _Greedy:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


_GREEDY = _Greedy()


def _table(calls: Any, long: int) -> Table:
    """Time the calls, in turns, so that a slow moment of the machine hits all sizes alike."""

    def once(sequences: Sequence[int], n: int) -> float:
        calls.call(sequences[:1], 1)  # as in serving, where calls of a size are seldom alike in a row
        return timed(sequences, n)

    def timed(sequences: Sequence[int], n: int) -> float:
        start = time.perf_counter()
        calls.call(sequences, n)
        return time.perf_counter() - start

    def more_seconds(sequences: Sequence[int], n: int, than: Sequence[int], m: int) -> float:
        """That a call takes beyond another one."""
        calls.call(sequences, n)
        gaps = sorted(once(sequences, n) - once(than, m) for _ in range(5))
        return max(0.0, gaps[2])

    calls.engine.reset()
    fit = _fit(calls.engine)
    # A size that is filled up to another one takes what that takes.
    sizes = sorted({n for n in map(fit, SIZES) if n + long < calls.most})
    one = calls.open(1)
    calls.fill(one, min(SHORT, long))
    short = calls.engine.length(one)
    met = []
    for n in sizes:
        try:
            calls.call([one], n)  # a shape that was never met takes longer
        except EngineError:  # an engine that was built for no call as large
            break
        met.append(n)
    sizes = met
    # The machine's moments differ by more than neighbouring sizes do: each call is timed beside one of the smallest size.
    smallest: list[float] = []
    ratios: dict[int, list[float]] = {n: [] for n in sizes}
    for turn in range(TURNS):
        for n in sizes:
            if turn < (TURNS if n <= 16 else TURNS // 2 if n <= 32 else 2):
                smallest.append(timed([one], sizes[0]))
                ratios[n].append(timed([one], n) / smallest[-1])
    base = median(smallest)
    flat = {n: base * median(ratios[n]) for n in sizes}
    all_of_them = [one]
    while len(all_of_them) < TOGETHER and calls.engine.room(calls.most):
        all_of_them.append(calls.open(len(all_of_them) + 1))
        calls.fill(all_of_them[-1], short)
    together = len(all_of_them)
    each = more_seconds(all_of_them, 1, [one], together) / (together - 1) if together > 1 else 0.0
    widths: list[int] = [n for n in (1, 8, 16, 32) if n in flat]
    far = all_of_them[-1]
    calls.fill(far, long - short)
    # Where there is room for one alone, there is nobody to take turns with.
    gaps = [more_seconds([far], n, [one], n) if far != one else max(0.0, once([far], n) - flat[n]) for n in widths]
    context = [gap / max(long - short, 1) for gap in gaps]
    calls.engine.reset()
    seconds_of = [max(flat[n] - short * float(np.interp(n, widths, context)), 1e-6) for n in sizes]
    return Table(sizes, seconds_of, widths, context, each, steps(calls.engine))


def describe(costs: Costs) -> str:
    """The tables as text."""
    lines = []
    for name, table in costs.tables.items():
        lines.append(f"{name}: ms by rows, one sequence, empty cache")
        lines.append("  " + "  ".join(f"{n}:{s * 1e3:.1f}" for n, s in zip(table.rows, table.seconds, strict=True)))
        each = ", ".join(f"{c * 1e6:.2f} at {n} rows" for n, c in zip(table.widths, table.context, strict=True))
        lines.append(f"  μs for each token in the cache: {each}; ms for each further sequence: {table.sequence * 1e3:.2f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    from engines.build_directory import BuildDirectory, BuildDirectoryError
    from engines.engine import EngineError

    parser = argparse.ArgumentParser(prog="python -m engines.costs", description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path, help="a build directory")
    parser.add_argument("--again", action="store_true", help="measure what is known already")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw it, too (needs matplotlib)")
    args = parser.parse_args(arguments)
    try:
        directory = BuildDirectory.open(args.build)
        costs = directory.costs(*directory.load(), again=args.again)
    except (BuildDirectoryError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{machine()}\n{describe(costs)}")
    if args.plot:
        _plot(costs, args.plot)
    return 0


def _plot(costs: Costs, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rows = np.arange(1, 129)
    for name, table in costs.tables.items():
        line = axis.plot(rows, table(rows, 1, 0) * 1e3, label=name)[0]
        axis.plot(rows, table(rows, 1, 1024) * 1e3, color=line.get_color(), linestyle=":")
    axis.set(xlabel="rows of a call", ylabel="ms", ylim=(0, None), title=f"{machine()}; dotted: 1,024 tokens in the cache")
    axis.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
