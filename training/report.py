"""What an evaluation says: acceptance lengths with intervals, calibration, boundaries, nodes; as a table and as plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from decoding.boundary import rejection_probabilities
from decoding.modes import MODES, ModeName
from decoding.sources import ORIGINS
from training.corpus import Answer
from training.replay import ROWS, Record

ADDED = (
    *(("ddtree", "dflash"), ("first_text", "ddtree"), ("first_second", "ddtree"), ("pooled", "first_text")),
    *(("free", "lookup"), ("all", "pooled")),
)
RESAMPLES = 2000
BINS = 10


def acceptance(answers: Sequence[Answer], records: Sequence[Record]) -> dict[str, Any]:
    """Acceptance length of a mode: mean over tasks, 95 % bootstrap interval, and by task."""
    tasks, tokens, cycles = _counts(answers, records)
    low, high = np.percentile(_resampled(tasks, tokens, cycles), [2.5, 97.5])
    by_task = {task: float(tokens[rows].sum() / cycles[rows].sum()) for task, rows in tasks.items()}
    return {"mean": float(np.mean(list(by_task.values()))), "low": float(low), "high": float(high), "by_task": by_task}


def _counts(answers: Sequence[Answer], records: Sequence[Record]) -> tuple[dict[str, NDArray], NDArray, NDArray]:
    """Rows of each task, tokens and cycles of each answer."""
    names = np.array([answer.task for answer in answers])
    tasks = {str(task): np.flatnonzero(names == task) for task in sorted(set(names.tolist()))}
    tokens = np.array([len(answer.response_ids) for answer in answers])
    return tasks, tokens, np.array([len(record.nodes) for record in records])


def _resampled(tasks: Mapping[str, NDArray], tokens: NDArray, cycles: NDArray, seed: int = 0) -> NDArray[np.float64]:
    """Means over tasks of ``RESAMPLES`` bootstrap samples; one seed draws the same prompts for every mode."""
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for rows in tasks.values():
        drawn = rows[rng.integers(len(rows), size=(RESAMPLES, len(rows)))]
        means += tokens[drawn].sum(1) / cycles[drawn].sum(1) / len(tasks)
    return means


def summarise(
    answers: Sequence[Answer], records: Mapping[str, Sequence[Record]], options: Mapping[str, Any], tokens: int
) -> dict[str, Any]:
    """All figures of an evaluation. Differences to ``d2sd`` are paired: both modes on the same resampled prompts."""
    lengths = {mode: acceptance(answers, seen) for mode, seen in records.items()}
    figures: dict[str, Any] = {
        "prompts": len(answers),
        "tokens": tokens,
        "decoding": dict(options),
        "acceptance_length": lengths,
        "nodes": {mode: float(np.mean([n for record in seen for n in record.nodes])) for mode, seen in records.items()},
    }
    if "d2sd" in records:
        tasks, count, cycles = _counts(answers, records["d2sd"])
        reference = _resampled(tasks, count, cycles)
        figures["gain_of_d2sd"] = {
            mode: _interval(reference - _resampled(tasks, count, _counts(answers, seen)[2]))
            for mode, seen in records.items()
            if mode != "d2sd"
        }
    figures["gain_at_no_more_nodes"] = _at_no_more_nodes(answers, records, figures["nodes"])
    figures["gain_at_equal_rows"] = _at_equal_rows(answers, records)
    trees = {mode: seen for mode, seen in records.items() if MODES[parts(mode)[0]].sources}
    figures["expected_of_said"] = {mode: _expected(seen) for mode, seen in trees.items()}
    figures["accepted_by_source"] = {mode: _sources(answers, seen) for mode, seen in trees.items()}
    for seen in records.values():
        confidences, correct, known = (
            np.array([row for record in seen for row in getattr(record, name)]) for name in ("confidences", "correct", "known")
        )
        if len(confidences):  # of the first mode that drafts
            figures["first_draft"] = first_draft(confidences, correct, known)
            break
    return figures


def _at_no_more_nodes(
    answers: Sequence[Answer], records: Mapping[str, Sequence[Record]], nodes: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Each mode against the ``d2sd`` of as many branches as verify no more nodes than it does: paired differences."""
    variants = [mode for mode in records if mode.partition("@")[0] == "d2sd"]
    gains = {}
    for mode, seen in records.items():
        fitting = [variant for variant in variants if nodes[variant] <= nodes[mode] and variant != mode]
        if mode not in variants and fitting:
            best = max(fitting, key=lambda variant: nodes[variant])
            tasks, count, cycles = _counts(answers, records[best])
            against = _resampled(tasks, count, _counts(answers, seen)[2])
            gains[mode] = {"of": best} | _interval(_resampled(tasks, count, cycles) - against)
    return gains


def _at_equal_rows(answers: Sequence[Answer], records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """What a source adds to a best-first tree of as many rows: paired differences."""
    gains = []
    for more, less in ADDED:
        for mode, seen in records.items():
            name, rows = parts(mode)
            other = less if less == "dflash" else f"{less}@{rows}"
            # The first draft alone has γ rows, and no more.
            comparable = other in records and (less != "dflash" or rows == len(records[other][0].confidences[0]) + 1)
            if name == more and comparable:
                tasks, count, cycles = _counts(answers, seen)
                against = _resampled(tasks, count, _counts(answers, records[other])[2])
                gains.append({"mode": mode, "over": other} | _interval(_resampled(tasks, count, cycles) - against))
    return gains


def _expected(records: Sequence[Record]) -> float:
    """Tokens that the trees promised, of those that were committed; the last cycle of an answer, which it cuts short, aside."""
    promised = sum(sum(record.expected[:-1]) for record in records)
    return float(promised / sum(sum(record.said[:-1]) for record in records))


def _sources(answers: Sequence[Answer], records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Share of the accepted tokens that each source proposed, by task; what two propose counts for both."""
    shares: dict[str, dict[str, float]] = {}
    for task in sorted({answer.task for answer in answers}):
        own = [o for answer, record in zip(answers, records, strict=True) if answer.task == task for o in record.origins]
        shares[task] = {
            name: float(np.mean([origin >> bit & 1 for origin in own])) if own else 0.0 for bit, name in enumerate(ORIGINS)
        }
    return shares


def _interval(differences: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.percentile(differences, [2.5, 97.5])
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}


def first_draft(confidences: NDArray, correct: NDArray, known: NDArray) -> dict[str, Any]:
    """What the first drafter's confidences are worth.

    Args:
        confidences, correct, known: ``[cycles, γ-1]``.

    Returns:
        accuracy: of each place, given that those before it are right. reliability: bins of confidence against the share that
        was right, and the expected calibration error. boundary_in_top: share of rejected drafts whose boundary is among the
        K likeliest, K = 1 ….
    """
    reached = (
        np.cumprod(np.concatenate([np.ones((len(correct), 1), bool), correct[:, :-1]], axis=1), axis=1).astype(bool) & known
    )
    accuracy = [float(correct[rows, k].mean()) if (rows := reached[:, k]).any() else None for k in range(correct.shape[1])]
    c, hit = confidences[reached], correct[reached]
    bins = np.minimum((c * BINS).astype(int), BINS - 1)
    reliability = [
        {"confidence": float(c[rows].mean()), "accuracy": float(hit[rows].mean()), "count": int(rows.sum())}
        for i in range(BINS)
        if (rows := bins == i).any()
    ]
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability) / len(c)
    accepted = np.cumprod(correct, axis=1).sum(1)
    rejected = np.array([a < len(row) and row[a] for a, row in zip(accepted, known, strict=True)])
    ranks = np.array(
        [
            np.argsort(-rejection_probabilities(c), kind="stable").tolist().index(a)
            for c, a in zip(confidences[rejected], accepted[rejected], strict=True)
        ]
    )
    top = [float((ranks < k).mean()) for k in range(1, correct.shape[1] + 1)]
    return {"accuracy": accuracy, "reliability": reliability, "calibration_error": float(error), "boundary_in_top": top}


def table(figures: Mapping[str, Any]) -> str:
    """Acceptance lengths as Markdown, a row a mode."""
    lengths = figures["acceptance_length"]
    tasks = list(next(iter(lengths.values()))["by_task"])
    gains = figures.get("gain_of_d2sd", {})
    fewer = figures.get("gain_at_no_more_nodes", {})
    heads = ["mode", "nodes", "mean", "95 %", "d2sd gains", "d2sd gains at no more nodes", *tasks]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for mode, length in sorted(lengths.items(), key=lambda item: item[1]["mean"]):
        gain, at = gains.get(mode), fewer.get(mode)
        cells = [
            mode,
            f"{figures['nodes'][mode]:.1f} of {_rows(mode, figures['decoding'])}",
            f"{length['mean']:.3f}",
            f"{length['low']:.3f} to {length['high']:.3f}",
            f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else "",
            f"{at['of']}: {at['mean']:+.3f} ({at['low']:+.3f} to {at['high']:+.3f})" if at else "",
            *(f"{length['by_task'][task]:.2f}" for task in tasks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts(mode: str) -> tuple[ModeName, int | None]:
    """The name and the number in ``MODE[:free][@N]``."""
    name, _, number = mode.replace(":free", "").partition("@")
    return cast(ModeName, name), int(number) if number else None


def _rows(mode: str, decoding: Mapping[str, Any]) -> int:
    """What a mode's cycle verifies at most: the rows of its tree, or whole branches of γ tokens as the paper does."""
    name, number = parts(mode)
    if MODES[name].sources:
        return number or ROWS
    added = 0 if MODES[name].branches is None else number or int(decoding["branches"])
    return (added + 1) * int(decoding["block_size"])


def table_of_gains(figures: Mapping[str, Any]) -> str:
    """What each source adds at equal rows, as Markdown."""
    lines = ["| tree | over | gain | 95 % |", "|---|---|---|---|"]
    for gain in figures["gain_at_equal_rows"]:
        lines.append(f"| {gain['mode']} | {gain['over']} | {gain['mean']:+.3f} | {gain['low']:+.3f} to {gain['high']:+.3f} |")
    return "\n".join(lines)


def table_of_sources(figures: Mapping[str, Any], mode: str) -> str:
    """Each source's share of the accepted tokens by task, as Markdown."""
    shares = figures["accepted_by_source"][mode]
    lines = ["| source | " + " | ".join(shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for name in ORIGINS:
        lines.append(f"| {name} | " + " | ".join(f"{own[name]:.0%}" for own in shares.values()) + " |")
    return "\n".join(lines)


def write_docs(figures: Mapping[str, Any], folder: Path) -> None:
    """Write ``acceptance.md`` and its plots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    lengths = dict(sorted(figures["acceptance_length"].items(), key=lambda item: item[1]["mean"]))
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(lengths) + 1.2), layout="constrained")
    means = [length["mean"] for length in lengths.values()]
    spread = [[m - length["low"] for m, length in zip(means, lengths.values(), strict=True)]]
    spread.append([length["high"] - m for m, length in zip(means, lengths.values(), strict=True)])
    axis.barh(list(lengths), means, xerr=spread, capsize=3)
    axis.set(xlabel="acceptance length, mean of the tasks, 95 % interval", xlim=(1, None))
    axis.margins(y=0.01)
    figure.savefig(folder / "acceptance.png", dpi=110)
    plt.close(figure)

    options = figures["decoding"]
    trees = ""
    if figures["gain_at_equal_rows"]:
        trees += f"\n## What a source adds at equal rows\n\n{table_of_gains(figures)}\n"
    if pooled := [mode for mode in figures["accepted_by_source"] if parts(mode)[0] == "pooled"]:
        promised = ", ".join(f"{mode} {share:.3f}" for mode, share in figures["expected_of_said"].items())
        trees += f"\n## Who proposed what was accepted\n\n`{pooled[-1]}`; what two propose counts for both.\n\n"
        trees += f"{table_of_sources(figures, pooled[-1])}\n\nTokens that the trees promised, of those committed: {promised}.\n"
    text = f"""# Acceptance length

{figures["prompts"]} answers of up to {figures["tokens"]} tokens to the prompts of `training/prompts/eval.jsonl`, greedy,
γ = {options["block_size"]}, K = {options["branches"]}. Made by `python -m training.evaluate pipeline.yaml --docs docs`.

{table(figures)}

*nodes*: verified a cycle, on average, of the rows that a tree may have (`@ROWS`) or whole branches of γ tokens would take.
*d2sd gains*: paired difference of the means, 95 % bootstrap interval; *at no more nodes*: of `d2sd` with as many branches
(`@K`) as verify no more nodes than the mode does.
{trees}
![acceptance lengths](acceptance.png)
"""
    if "first_draft" in figures:
        text += _write_first_draft(figures["first_draft"], folder)
    (folder / "acceptance.md").write_text(text, encoding="utf-8")


def _write_first_draft(draft: Mapping[str, Any], folder: Path) -> str:
    """Write the plot of what a draft is worth by itself; returns what the page says of it."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.plot([b["confidence"] for b in draft["reliability"]], [b["accuracy"] for b in draft["reliability"]], marker="o")
    left.set(xlabel="confidence", ylabel="share accepted", title=f"Reliability, error {draft['calibration_error']:.3f}")
    middle.bar(range(1, len(draft["accuracy"]) + 1), [share or 0.0 for share in draft["accuracy"]])
    middle.set(xlabel="place in the block", ylabel="share right, if reached", title="Accuracy of the first draft", ylim=(0, 1))
    right.plot(range(1, len(draft["boundary_in_top"]) + 1), draft["boundary_in_top"], marker="o")
    right.set(xlabel="K", ylabel="share of rejected drafts", title="True boundary among the K likeliest", ylim=(0, 1.02))
    figure.savefig(folder / "first_draft.png", dpi=110)
    plt.close(figure)
    shares = ", ".join(f"K={k} {share:.0%}" for k, share in enumerate(draft["boundary_in_top"], 1))
    return f"""
## The first draft

![reliability, accuracy by place, boundaries](first_draft.png)

Expected calibration error {draft["calibration_error"]:.3f}. The true boundary of a rejected draft is among the K likeliest:
{shares}.
"""
