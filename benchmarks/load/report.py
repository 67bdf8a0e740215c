"""The figures as a page: a table, and a plot."""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD = """# Under load

How a served build holds when many ask at once, prompts are long, and clients leave, dawdle or send nonsense. Real Triton, its
clients and its engines on one machine with few cores. Made by `python -m benchmarks.load build/`; arrivals, lengths and texts
come from a seed.

"""


def write_report(figures: dict[str, Any], page: Path) -> None:
    """Write the page and, beside it, its plot. What was not measured is left out."""
    parts = [HEAD + _ran_on({name: figures["ran_on"][name] for name in WRITERS if name in figures})]
    for name, write in WRITERS.items():
        if name in figures:
            parts.append(write(figures[name]))
    if _plot(figures, page.with_suffix(".png")):
        parts.append(f"![throughput and memory]({page.stem}.png)\n")
    page.write_text("\n".join(parts), encoding="utf-8")


def _ran_on(named: dict[str, str]) -> str:
    """Machine and build of the cases; usually there is one, and another for what wants exact arithmetic."""
    lines = []
    for where in dict.fromkeys(named.values()):
        cases = ", ".join(f"`{name}`" for name, own in named.items() if own == where)
        lines.append(f"* {cases}: {where}\n")
    return "".join(lines)


def _storm(f: dict[str, Any]) -> str:
    rows = "".join(f"| {verdict} | {count} |\n" for verdict, count in sorted(f["verdicts"].items()))
    return (
        f"## Many requests\n\n{f['requests']} requests in several modes. The first 250 find the pace that the machine just "
        "keeps up with, the others arrive at it, whatever becomes of those before (their times say little and are left out). A "
        "fifth was to leave at a random moment, a twentieth is malformed. Each answer is held against what the target says "
        "alone, offline, to the letter.\n\n"
        f"| ended | requests |\n|---|---|\n{rows}\n"
        f"The server's memory changed by {100 * f['memory_growth']:+.1f} % from the third quarter to the last. "
        f"{_held(f['held'])}\n"
    )


def _held(levels: dict[str, float]) -> str:
    kept = ", ".join(f"`{name}` {value:g}" for name, value in levels.items() if value)
    return f"NOT FREED at the end: {kept}." if kept else "At the end every place and every row of the cache was free."


def _long_prompts(f: dict[str, Any]) -> str:
    rows = "".join(
        f"| {r['usual']:.3f} | {r['median']:.3f} | {r['largest']:.3f} | {', '.join(f'{s:.1f}' for s in r['first_tokens'])} |\n"
        for r in f["runs"]
    )
    return (
        "## Three long prompts beside a stream\n\nSeconds between the pieces of a running stream before and while three "
        "prompts of 1,900 tokens arrive, and until the first tokens of these.\n\n"
        f"| usual gap | median gap meanwhile | largest gap | first tokens |\n|---|---|---|---|\n{rows}"
    )


def _cancelled_crowd(f: dict[str, Any]) -> str:
    return (
        "## Behind twelve long requests that have left\n\n"
        f"A short request takes {median(f['behind']):.2f} s, alone {median(f['alone']):.2f} s: {f['ratio']:.2f} times as long, "
        f"the median of {len(f['alone'])} pairs.\n"
    )


def _throughput(f: dict[str, Any]) -> str:
    modes = list(dict.fromkeys(row["mode"] for row in f["rows"]))
    rates = {(row["streams"], row["mode"]): row["tokens_per_second"] for row in f["rows"]}
    streams = sorted({row["streams"] for row in f["rows"]})
    lines = [f"| {n} | " + " | ".join(f"{rates[n, mode]:.0f}" for mode in modes) + " |" for n in streams]
    return (
        "## Tokens a second\n\nPrompts of 300 tokens, answers of 100, prefill included; medians of 2 to 5 runs in turn."
        "\n\n| streams | " + " | ".join(modes) + " |\n|---|" + "---|" * len(modes) + "\n" + "\n".join(lines) + "\n"
    )


def _conversations(f: dict[str, Any]) -> str:
    lines = [f"| {n} | {turn['known']:.2f} | {turn['fresh']:.2f} |" for n, turn in enumerate(f["turns"], 1)]
    crowds = "".join(f"| {name} | {c['seconds']:.1f} | {c['last_first_token']:.1f} |\n" for name, c in f["crowds"].items())
    return (
        "## What was computed before\n\nSeconds to the first token of each turn of a conversation, and of the same chat with a "
        "beginning that nobody has sent.\n\n| turn | known | fresh |\n|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nThe second turn behind 1,500 tokens of history comes {f['second_turn']:.1f} times sooner than without them in "
        f"the cache; with all of it computed anew its answer is {'the same' if f['same'] else 'ANOTHER'}.\n\n"
        f"| 16 clients with | all answered after, s | last first token, s |\n|---|---|---|\n{crowds}"
    )


def _slow_reader(f: dict[str, Any]) -> str:
    return (
        "## A reader of a byte a second\n\n"
        f"A fast reader beside it has its answer after {f['while_answered']:.2f} s while both are answered, and after "
        f"{f['while_unread']:.2f} s while the slow one has still to read its own; alone after {f['alone']:.2f} s.\n"
    )


def _hung_up(f: dict[str, Any]) -> str:
    rows = "".join(f"| {name} | {r['alone']:.2f} | {r['after']:.2f} | {r['bound']:.1f} |\n" for name, r in f.items())
    return (
        "## Clients of /generate that hang up\n\nTriton 2.51 doesn't tell a model that a client of `/generate` or "
        "`/generate_stream` has hung up; over gRPC it tells `d2sd` and `tensorrt_llm_bls`, but no ensemble. What they asked "
        "for is computed to its end: the length they named, or their `timeout` (a parameter, in microseconds), or "
        "`limits.deadline`. A request with an id can be stopped by it. Four clients hung up after half a second:\n\n"
        "| they asked for | short request alone, s | right after, s | until as usual, s |\n|---|---|---|---|\n" + rows
    )


WRITERS = {
    "storm": _storm,
    "long_prompts": _long_prompts,
    "cancelled_crowd": _cancelled_crowd,
    "throughput": _throughput,
    "conversations": _conversations,
    "slow_reader": _slow_reader,
    "hung_up": _hung_up,
}


def _plot(figures: dict[str, Any], file: Path) -> bool:
    """Throughput by streams, and memory over time. False if there is neither."""
    shown = [name for name in ("throughput", "storm") if name in figures]
    if not shown:
        return False
    picture, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 3.2), squeeze=False)
    for name, axis in zip(shown, axes[0], strict=True):
        if name == "throughput":
            for mode in dict.fromkeys(row["mode"] for row in figures[name]["rows"]):
                rows = [row for row in figures[name]["rows"] if row["mode"] == mode]
                axis.plot([r["streams"] for r in rows], [r["tokens_per_second"] for r in rows], marker="o", label=mode)
            axis.set(xlabel="streams", ylabel="tokens/s", ylim=(0, None))
            axis.legend(loc="lower right")
        else:
            axis.plot(figures[name]["memory_mib"])
            axis.set(xlabel="seconds", ylabel="memory, MiB", ylim=(0, None))
    picture.tight_layout()
    picture.savefig(file, dpi=110)
    plt.close(picture)
    return True
