"""``python -m training.calibrate pipeline.yaml --drafter dflash|vp``: temperatures that make a drafter's probabilities true.

A tree is chosen by the probability that the target accepts each node, and a planner weighs it against what a row costs. So
what must be true is the probability of a token given that all before it in its block were accepted. One temperature for each
place behind the last kept token is fitted to that on the held-out answers (log loss of "the likeliest token is right"). The
expected calibration error (ECE, ten bins) that is shown is that of each half of them at the temperatures of the other half.
They stand in the checkpoint's ``dflash_config.confidence_temperatures``; the exported graph applies them
(``export/drafter.py``).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from export import checkpoints
from export.config import UserError, load
from training.blocks import lay_blocks, sample_anchors
from training.corpus import read_corpus
from training.data import Data
from training.drafting import Drafting
from training.features import Features
from training.losses import ban
from training.precision import precision
from training.student import Student

GRID = torch.logspace(-0.35, 0.35, 29, base=10.0)  # temperatures that are tried: 0.45 to 2.24; the middle one is 1
ENOUGH = 400  # observations of a place; with fewer it takes the temperature of the place before it
ANCHORS = 256  # of each held-out answer, at most


@torch.no_grad()
def observe(drafting: Drafting, data: Data, number: int, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What the drafter says behind accepted tokens of some answers.

    Args:
        number: of this batch; it draws the anchors.

    Returns:
        depth ``[R]``: from 1, masked places from the last kept token; confidence ``[R, len(GRID)]`` of the likeliest token at
        each temperature; right ``[R]`` bool.
    """
    student, gamma, device = drafting.student, int(drafting.student.config.block_size), drafting.device
    with precision(device):
        batch = data.load(indices, f"calibrate/{number}", device)
    anchors = sample_anchors(batch.prompt_lengths.cpu(), batch.lengths.cpu(), ANCHORS, batch.generator).to(device)
    if drafting.first is None:
        kept = torch.zeros_like(anchors)
        blocks = lay_blocks(batch.tokens, batch.lengths, anchors, kept, gamma, student.mask_id, 1.0)
        banned, asked = torch.full_like(blocks.ids, -1), anchors >= 0
    else:
        kept, refused, _ = drafting.first_draft(batch, anchors)
        blocks, banned = drafting.redraft(batch, anchors, kept, refused)
        asked = (anchors >= 0) & (refused >= 0)
    rows = (blocks.weights > 0) & asked.repeat_interleave(gamma, dim=1)
    logits = ban(student.logits(batch.features, blocks, rows).float(), banned[rows])
    right = torch.zeros_like(rows)
    right[rows] = student.draft_ids[logits.argmax(-1)] == blocks.labels[rows]
    k = torch.arange(gamma, device=device)
    so_far = (right.view(*anchors.shape, gamma) | (k <= kept[..., None])).long().cumprod(-1)
    reached = torch.cat([torch.ones_like(so_far[..., :1]), so_far[..., :-1]], -1).flatten(1)[rows] > 0
    depth = (k - kept[..., None]).flatten(1)[rows][reached]
    logits = logits[reached]
    logits -= logits.amax(-1, keepdim=True)
    confidence = torch.stack([1 / torch.exp(logits / t).sum(-1) for t in GRID.tolist()], -1)
    return depth, confidence, right[rows][reached]


def fit(depth: Tensor, confidence: Tensor, right: Tensor, places: int) -> Tensor:
    """Return the index into ``GRID`` of the best temperature of each place, ``[places]``."""
    chosen: list[int] = []
    for place in range(1, places + 1):
        here = depth == place
        if int(here.sum()) < ENOUGH:
            chosen.append(chosen[-1] if chosen else len(GRID) // 2)
            continue
        c, truth = confidence[here].double().clamp(1e-6, 1 - 1e-6), right[here][:, None]
        loss = -torch.where(truth, c.log(), (1 - c).log()).mean(0)
        chosen.append(int(loss.argmin()))
    return torch.tensor(chosen)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Expected calibration error: the mean gap between confidence and share of right ones over equal bins, by their size."""
    if not len(right):
        return 0.0
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, confidence.double() - right.double())
    return float(gaps.abs().sum() / len(right))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.calibrate", description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--drafter", choices=("dflash", "vp"), required=True)
    parser.add_argument("--path", type=Path, help="the drafter (default: build/training/DRAFTER)")
    parser.add_argument("--first", type=Path, help="DFlash that a VP-Drafter follows (default: build/training/dflash)")
    args = parser.parse_args(arguments)
    try:
        print(calibrate(args))
    except (UserError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def calibrate(args: argparse.Namespace) -> str:
    """Fit, write the checkpoint's config.json, and return a table of what changed."""
    pipeline = load(args.pipeline)
    path = args.path or Path("build/training") / args.drafter
    folder = checkpoints.open_target(checkpoints.locate(pipeline.target.checkpoint, pipeline.target.revision))
    target = checkpoints.load_target(folder)
    answers = read_corpus(Path(pipeline.training.corpus))
    student = Student.load(path, target)
    first = Student.load(args.first or Path("build/training/dflash"), target) if args.drafter == "vp" else None
    ids = checkpoints.read_drafter(path).target_layer_ids
    features = Features(answers, target, ids, None)
    options = pipeline.training.model_copy(update={"loss": "tokens", "foreseen": 1.0})  # nothing is learned here
    data, drafting = Data(answers, features, options), Drafting(student, first, options, torch.device("cpu"))
    held_out = [i for i in data.held_out if answers[i].temperature == 0]
    if len(held_out) < 2:
        raise ValueError(f"{pipeline.training.corpus}: found {len(held_out)} held-out greedy answers, allowed: 2 or more")
    halves = []
    for half in range(2):
        chosen = sorted(held_out[half::2], key=lambda i: len(answers[i]))
        seen = []
        for start in range(0, len(chosen), 8):
            seen.append(observe(drafting, data, start, chosen[start : start + 8]))
            print(f"{half * len(chosen) + start}/{len(held_out)} answers", file=sys.stderr, flush=True)
        halves.append([torch.cat(parts) for parts in zip(*seen, strict=True)])
    places = int(student.config.block_size) - 1
    depth, confidence, right = (torch.cat(parts) for parts in zip(*halves, strict=True))
    best = fit(depth, confidence, right, places)
    crossed = []
    for own, (their_depth, their_confidence, their_right) in zip(halves, halves[::-1], strict=True):
        temperatures = fit(their_depth, their_confidence, their_right, places)
        crossed.append(own[1].gather(1, temperatures[own[0] - 1][:, None]).squeeze(1))
    before, after = confidence[:, len(GRID) // 2], torch.cat(crossed)
    lines = ["| place | seen | temperature | ECE before | ECE after |", "|---|---|---|---|---|"]
    for place in [*range(1, places + 1), 0]:
        here = depth == place if place else depth > 0
        errors = f"{calibration_error(before[here], right[here]):.3f} | {calibration_error(after[here], right[here]):.3f}"
        temperature = f"{GRID[best[place - 1]]:.2f}" if place else ""
        lines.append(f"| {place or 'all'} | {int(here.sum())} | {temperature} | {errors} |")
    config = checkpoints.read_json(path / "config.json", f"drafter {path}")
    config["dflash_config"][checkpoints.TEMPERATURES] = [round(float(t), 3) for t in GRID[best]]
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
