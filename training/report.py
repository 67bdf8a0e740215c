"""What an evaluation says: acceptance lengths with intervals, calibration, boundaries, nodes; as a table and as plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoding.boundary import rejection_probabilities
from decoding.modes import MODES
from training.corpus import Answer
from training.replay import Record

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
    seen = next(iter(records.values()))
    confidences, correct, known = (
        np.array([row for record in seen for row in getattr(record, name)]) for name in ("confidences", "correct", "known")
    )
    if len(confidences):
        figures["first_draft"] = first_draft(confidences, correct, known)
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
            f"{figures['nodes'][mode]:.1f} of {_rows_as_branches(mode, figures['decoding'])}",
            f"{length['mean']:.3f}",
            f"{length['low']:.3f} to {length['high']:.3f}",
            f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else "",
            f"{at['of']}: {at['mean']:+.3f} ({at['low']:+.3f} to {at['high']:+.3f})" if at else "",
            *(f"{length['by_task'][task]:.2f}" for task in tasks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows_as_branches(mode: str, decoding: Mapping[str, Any]) -> int:
    """What a mode's cycle would verify as whole branches of γ tokens, as the paper does: (K + 1)·γ."""
    name, _, branches = mode.replace(":free", "").partition("@")
    added = 0 if MODES[name].branches is None else int(branches or decoding["branches"])  # type: ignore[index]
    return int((added + 1) * decoding["block_size"])


def write_docs(figures: Mapping[str, Any], folder: Path) -> None:
    """Write ``acceptance.md`` and its plots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    draft = figures["first_draft"]
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

    lengths = dict(sorted(figures["acceptance_length"].items(), key=lambda item: item[1]["mean"]))
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(lengths) + 1.2), layout="constrained")
    means = [length["mean"] for length in lengths.values()]
    spread = [[m - length["low"] for m, length in zip(means, lengths.values(), strict=True)]]
    spread.append([length["high"] - m for m, length in zip(means, lengths.values(), strict=True)])
    axis.barh(list(lengths), means, xerr=spread, capsize=3)
    axis.set(xlabel="acceptance length, mean of the tasks, 95 % interval", xlim=(1, None))
    figure.savefig(folder / "acceptance.png", dpi=110)
    plt.close(figure)

    options, shares = figures["decoding"], draft["boundary_in_top"]
    text = f"""# Acceptance length

{figures["prompts"]} answers of up to {figures["tokens"]} tokens to the prompts of `training/prompts/eval.jsonl`, greedy,
γ = {options["block_size"]}, K = {options["branches"]}. Made by `python -m training.evaluate pipeline.yaml --docs docs`.

{table(figures)}

*nodes*: verified a cycle, on average, of the rows that whole branches of γ tokens would take. *d2sd gains*: paired difference
of the means, 95 % bootstrap interval; *at no more nodes*: of `d2sd` with as many branches (`@K`) as verify no more nodes than
the mode does.

![acceptance lengths](acceptance.png)

## The first draft

![reliability, accuracy by place, boundaries](first_draft.png)

Expected calibration error {draft["calibration_error"]:.3f}. The true boundary of a rejected draft is among the K likeliest:
{", ".join(f"K={k} {share:.0%}" for k, share in enumerate(shares, 1))}.
"""
    (folder / "acceptance.md").write_text(text, encoding="utf-8")
