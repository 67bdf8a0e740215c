"""``python -m training.train pipeline.yaml --drafter dflash|vp``: train a drafter for the pipeline's target.

On a CPU, a GPU, or several under ``torchrun``. The whole state is written at every validation: a run that was killed goes
on from there to the weights that it would have reached.
"""

import argparse
import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from decoding import best_first, sources
from decoding.acceptance import walk
from decoding.calibration import Calibration
from decoding.drafts import Draft
from export import checkpoints
from export.config import TrainingSection, UserError, load
from export.drafter import CANDIDATES
from training.blocks import Blocks, discount, lay_blocks, sample_anchors, sample_kept
from training.corpus import read_corpus
from training.data import Batch, Data
from training.features import Features, cache_folder
from training.losses import ban, leading, likeliest, weighted_cross_entropy
from training.muon import Muon
from training.student import Student, draft_vocabulary, feature_scale

VALIDATE_EVERY = 100  # steps
VALIDATED = 128  # held-out answers at most, spread over the corpus
SAVE_EVERY = 180  # seconds, between validations
TREE = 12  # rows of the tree that validation grows
WARM_UP, DECAY = 0.03, 0.4  # shares of the run in which the learning rate rises from 0, and falls to 0


class Trainer:
    """A student, its optimisers and the running average of its weights.

    Args:
        first: the trained first drafter, whose rejections a VP-Drafter learns from; None trains DFlash itself.
        output: folder of the state, the logs and the drafter.
    """

    def __init__(
        self,
        student: Student,
        first: Student | None,
        data: Data,
        options: TrainingSection,
        output: Path,
        device: torch.device,
    ) -> None:
        self.student, self.first = student.to(device), first.to(device).eval() if first else None
        self.data, self.options, self.output, self.device = data, options, output, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.step = self.epoch = self.offset = 0
        self.average = [p.detach().clone() for p in student.parameters()]
        matrices = [p for p in student.parameters() if p.ndim == 2]
        vectors = [p for p in student.parameters() if p.ndim != 2]
        rate = options.learning_rate
        # Muon's update has the size of AdamW's, so that one rate serves both.
        self.optimisers = [
            Muon(matrices, lr=rate, weight_decay=0.01, dtype=torch.bfloat16 if fast_bf16(device) else torch.float32),
            torch.optim.AdamW(vectors, lr=rate, weight_decay=0.0, betas=(0.9, 0.95)),
        ]

    def rate(self) -> float:
        """Share of the full learning rate at this step: up, flat, then down to 0."""
        done = (self.step + 1) / self.options.steps
        return min(1.0, done / WARM_UP, max(0.0, (1 - done) / DECAY) + 1e-3)

    def run(self) -> None:
        """Train to the end, going on from a saved state if there is one."""
        self.restore()
        with SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step) as board:
            if self.step == 0:  # what training starts from, against which all later validations stand
                self.log({"step": 0} | self.validate(), board)
            began, blocks = time.monotonic(), 0
            saved = began
            while self.step < self.options.steps:
                loss, count = self.train_step()
                blocks += count
                record: dict[str, Any] = {
                    "step": self.step,
                    "epoch": self.epoch,
                    "loss": round(loss, 4),
                    "rate": self.rate(),
                }
                record["blocks_per_second"] = round(blocks / (time.monotonic() - began), 1)
                if self.step % VALIDATE_EVERY == 0 or self.step == self.options.steps:
                    record |= self.validate()
                    self.save()
                    saved = time.monotonic()
                elif time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
                self.log(record, board)

    def train_step(self) -> tuple[float, int]:
        """One update. Returns the loss and the number of blocks seen on this device."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.options.learning_rate * self.rate()
            optimiser.zero_grad(set_to_none=True)
        loss, count = 0.0, 0
        for _ in range(self.options.accumulate):
            batch = self.next_batch()
            anchors = sample_anchors(batch.prompt_lengths.cpu(), batch.lengths.cpu(), self.options.anchors, batch.generator)
            with self.precision():
                part = self.loss(batch, anchors.to(self.device)) / self.options.accumulate
            part.backward()
            loss, count = loss + float(part.detach()), count + int((anchors >= 0).sum())
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        if self.world > 1:
            for p in parameters:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        decay = min(self.options.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.student.parameters()), 1 - decay)
        return loss, count

    def next_batch(self) -> Batch:
        """This device's next batch; every epoch's order is another."""
        groups = self.data.epoch(self.epoch)
        if self.offset + self.world > len(groups):
            self.epoch, self.offset = self.epoch + 1, 0
            groups = self.data.epoch(self.epoch)
        number = self.offset + self.rank
        self.offset += self.world
        with self.precision():  # of the target's pass, too
            return self.data.load(groups[number], f"{self.options.seed}/{self.epoch}/{number}", self.device)

    def loss(self, batch: Batch, anchors: Tensor) -> Tensor:
        """Mean over blocks of the weighted cross-entropy of their masked places."""
        blocks, banned = self.lay(batch, anchors, self.options.rejections)
        if batch.foreseen is not None:
            blocks = discount(blocks, batch.foreseen.gather(1, anchors.clamp(min=0)), self.options.foreseen)
        labels = self.student.to_draft[blocks.labels]
        rows = (blocks.weights > 0) & (labels >= 0) & (labels != banned)
        hidden = self.student.hidden(batch.features, blocks, rows)
        count = (blocks.weights.sum().round()).clamp(min=1)
        wanted = self.wanted(batch, blocks, rows, labels[rows], banned[rows])
        head, weights = self.student.head, blocks.weights[rows]
        return weighted_cross_entropy(hidden, head, labels[rows], weights, banned[rows], wanted) / count

    @torch.no_grad()
    def wanted(self, batch: Batch, blocks: Blocks, rows: Tensor, labels: Tensor, banned: Tensor) -> Tensor | None:
        """What the loss compares each row with: the target's distribution there ``[R, Vd]``, or None for its token alone.

        Many blocks predict one place: the head is multiplied once for it. The distribution is the one over the draft
        vocabulary, without the banned token.
        """
        if batch.last is None:
            return None
        answer = torch.arange(len(rows), device=self.device)[:, None].expand_as(rows)[rows]
        places, back = torch.unique(answer * batch.tokens.shape[1] + blocks.positions[rows] - 1, return_inverse=True)
        said = F.linear(batch.last.flatten(0, 1)[places], self.student.head).float()
        wanted = ban(said[back], banned).softmax(-1)
        if self.options.loss == "mixed":
            wanted *= 0.5
            wanted[torch.arange(len(labels), device=self.device), labels] += 0.5
        return wanted

    def lay(self, batch: Batch, anchors: Tensor, rejections: float) -> tuple[Blocks, Tensor]:
        """Blocks to train on, and the draft index that each place may not say, ``[S, N]``, or -1.

        A VP-Drafter's block keeps l ∝ β^l true tokens or, as often as ``rejections`` says, what the first drafter got
        right at this anchor; then the token that it got wrong there is banned, since an exclusive redraft bans it.
        """
        gamma, mask_id, tau = int(self.student.config.block_size), self.student.mask_id, self.options.tau
        nothing = torch.zeros_like(anchors)
        banned = torch.full((*anchors.shape, gamma), -1, device=self.device)
        if self.first is None:
            return lay_blocks(batch.tokens, batch.lengths, anchors, nothing, gamma, mask_id, tau), banned.flatten(1)
        kept = sample_kept(tuple(anchors.shape), gamma, self.options.beta, batch.generator).to(self.device)
        if rejections > 0:
            accepted, refused, _ = self.first_draft(batch, anchors)
            real = (torch.rand(anchors.shape, generator=batch.generator).to(self.device) < rejections) & (refused >= 0)
            kept = torch.where(real, accepted, kept)
            place = (kept + 1).clamp(max=gamma - 1)[..., None]
            banned = banned.scatter(2, place, torch.where(real, self.student.to_draft[refused.clamp(min=0)], -1)[..., None])
        return lay_blocks(batch.tokens, batch.lengths, anchors, kept, gamma, mask_id, tau), banned.flatten(1)

    @torch.no_grad()
    def first_draft(self, batch: Batch, anchors: Tensor, width: int = 1) -> tuple[Tensor, Tensor, Draft]:
        """What the first drafter makes of each block.

        Args:
            width: W, candidates of each place.

        Returns:
            accepted ``[S, A]``: leading tokens that are right; refused ``[S, A]``: the first wrong one, -1 if the block
            or the answer ended before; the draft of S·A blocks, γ-1 places and W candidates.
        """
        first = self.first or self.student
        gamma = int(first.config.block_size)
        blocks = lay_blocks(batch.tokens, batch.lengths, anchors, torch.zeros_like(anchors), gamma, first.mask_id, 1.0)
        drafted = (torch.arange(blocks.ids.shape[1], device=self.device) % gamma > 0).expand_as(blocks.ids)
        probabilities, best = likeliest(first.hidden(batch.features, blocks, drafted), first.head, width)
        shape = (*anchors.shape, gamma - 1)
        candidates = first.draft_ids[best].view(*shape, width)
        tokens = candidates[..., 0]
        known = (blocks.weights > 0)[drafted].view(shape)
        accepted = leading((tokens == blocks.labels[drafted].view(shape)) & known)
        place = accepted.clamp(max=gamma - 2)[..., None]
        missed = (accepted < gamma - 1) & known.gather(2, place).squeeze(2)
        refused = torch.where(missed, tokens.gather(2, place).squeeze(2), -1)
        probabilities = probabilities.view(*shape, width)
        return accepted, refused, Draft([], anchors.flatten(), candidates.flatten(0, 1), probabilities.flatten(0, 1))

    @cached_property
    def validation(self) -> list[tuple[Batch, Tensor]]:
        """Held-out greedy answers and anchors of each, ``[S, A]``: the same at every validation, so that they are kept."""
        held_out = [i for i in self.data.held_out if self.data.answers[i].temperature == 0]
        held_out = held_out[:: -(-len(held_out) // VALIDATED) or 1]
        found = []
        for start in range(0, len(held_out), 8):
            with self.precision():
                batch = self.data.load(held_out[start : start + 8], f"validate/{start}", self.device)
            anchors = sample_anchors(batch.prompt_lengths.cpu(), batch.lengths.cpu(), 32, batch.generator)
            found.append((batch, anchors.to(self.device)))
        return found

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Acceptance length on held-out greedy answers, with the averaged weights, every anchor counting the same.

        For DFlash the tokens of its own block, and those of its best-first tree of ``TREE`` rows; for a VP-Drafter those of
        both drafters, its exclusive redraft at the first one's rejection counted whether or not that boundary would have been
        selected.
        """
        won, grown, count = 0, 0, 0
        with self.averaged(), self.precision():
            for batch, anchors in self.validation:
                accepted, refused, draft = self.first_draft(batch, anchors, 1 if self.first else CANDIDATES)
                count += int((anchors >= 0).sum())
                won += int((accepted + 1)[anchors >= 0].sum())
                if self.first is not None:
                    won += int(self.redraft_gain(batch, anchors, accepted, refused).sum())
                else:
                    grown += int((tree_gain(batch, anchors, draft) + 1)[anchors >= 0].sum())
        lengths = {"acceptance_length": won} | ({} if self.first else {"tree_length": grown})
        return {name: round(tokens / max(count, 1), 4) for name, tokens in lengths.items()}

    def redraft(self, batch: Batch, anchors: Tensor, accepted: Tensor, refused: Tensor) -> tuple[Blocks, Tensor]:
        """Blocks kept up to the first drafter's rejections, and the draft index banned at each place ``[S, N]``, or -1."""
        gamma = int(self.student.config.block_size)
        blocks = lay_blocks(batch.tokens, batch.lengths, anchors, accepted, gamma, self.student.mask_id, 1.0)
        banned = torch.full((*anchors.shape, gamma), -1, device=self.device)
        index = torch.where((refused >= 0) & (anchors >= 0), self.student.to_draft[refused.clamp(min=0)], -1)
        return blocks, banned.scatter(2, (accepted + 1).clamp(max=gamma - 1)[..., None], index[..., None]).flatten(1)

    def redraft_gain(self, batch: Batch, anchors: Tensor, accepted: Tensor, refused: Tensor) -> Tensor:
        """Tokens ``[S, A]`` that the student's redraft adds behind the first drafter's rejection."""
        missed = (refused >= 0) & (anchors >= 0)
        blocks, banned = self.redraft(batch, anchors, accepted, refused)
        rows = blocks.weights > 0
        said = ban(self.student.logits(batch.features, blocks, rows).float(), banned[rows]).argmax(-1)
        gamma = int(self.student.config.block_size)
        right = torch.zeros_like(rows)
        right[rows] = self.student.draft_ids[said] == blocks.labels[rows]
        k = torch.arange(gamma, device=self.device)
        right = right.view(*anchors.shape, gamma) | (k <= accepted[..., None])
        return (leading(right) - 1 - accepted).clamp(min=0) * missed

    def precision(self) -> AbstractContextManager[object]:
        """bf16 where the device multiplies it faster than f32."""
        return torch.autocast(self.device.type, torch.bfloat16) if fast_bf16(self.device) else nullcontext()

    def averaged(self) -> "Averaged":
        return Averaged(list(self.student.parameters()), self.average)

    def save(self) -> None:
        """Write the state to go on from, then the drafter as it is now."""
        if self.rank:
            return
        state = {
            "progress": (self.step, self.epoch, self.offset),
            "student": [p.detach() for p in self.student.parameters()],
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.output / "state.partial"
        torch.save(state, partial)
        partial.rename(self.output / "state.pt")
        with self.averaged():
            self.student.save(self.output)

    def restore(self) -> None:
        path = self.output / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step, self.epoch, self.offset = state["progress"]
        with torch.no_grad():
            for mine, saved in zip(self.student.parameters(), state["student"], strict=True):
                mine.copy_(saved)
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        if self.rank == 0:
            print(f"going on from step {self.step}", file=sys.stderr)

    def log(self, record: dict[str, Any], board: SummaryWriter) -> None:
        if self.rank:
            return
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if key != "step":
                board.add_scalar(key, value, record["step"])
        if self.step % 20 == 0 or "acceptance_length" in record:
            print("  ".join(f"{key} {value}" for key, value in record.items()), file=sys.stderr, flush=True)


def tree_gain(batch: Batch, anchors: Tensor, draft: Draft) -> Tensor:
    """Tokens ``[S, A]`` that a best-first tree of ``TREE`` rows, anchor included, gains from a first draft's marginals."""
    positions = anchors.clamp(min=0)[..., None] + 1 + torch.arange(draft.tokens.shape[1] + 1, device=anchors.device)
    within = positions < batch.lengths[:, None, None]
    truth = batch.tokens.gather(1, positions.clamp(max=batch.tokens.shape[1] - 1).flatten(1)).view_as(positions)
    said = torch.where(within, truth, -2).flatten(0, 1).cpu().numpy()  # behind the end: what no tree holds
    draft = Draft([], *(x.cpu().numpy() for x in (draft.anchors, draft.candidates, draft.probabilities)))
    tree = best_first.grow(draft.anchors, [sources.first(draft)], TREE, Calibration().factors)
    nodes, _ = walk(tree, lambda depth, _: said[:, depth])
    return torch.from_numpy((nodes > 0).sum(1)).view(anchors.shape).to(anchors.device)


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices faster than f32 ones."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Averaged:
    """Within it, the parameters hold their running average."""

    def __init__(self, parameters: list[torch.nn.Parameter], average: list[Tensor]) -> None:
        self.parameters, self.average = parameters, average

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--drafter", choices=("dflash", "vp"), required=True)
    parser.add_argument("--output", type=Path, help="folder of the drafter and its state (default: build/training/DRAFTER)")
    parser.add_argument("--start", type=Path, help="drafter to start from (default for vp: the DFlash of --first)")
    parser.add_argument("--first", type=Path, help="trained DFlash that a VP-Drafter follows (default: build/training/dflash)")
    parser.add_argument("--no-cache", action="store_true", help="compute the target's features anew each epoch")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (UserError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    pipeline = load(args.pipeline)
    options = pipeline.training
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    output = args.output or Path("build/training") / args.drafter
    output.mkdir(parents=True, exist_ok=True)

    folder = checkpoints.open_target(checkpoints.locate(pipeline.target.checkpoint, pipeline.target.revision))
    target = checkpoints.load_target(folder)
    target.to(device)  # type: ignore[arg-type]
    answers = read_corpus(Path(options.corpus))
    torch.manual_seed(options.seed)
    first_path = None
    if args.drafter == "vp":
        first_path = args.first or Path("build/training/dflash")
    start = args.start or first_path
    ids = options.target_layer_ids or checkpoints.spread_layers(target.config.num_hidden_layers, options.layers)
    if start is not None:
        ids = checkpoints.read_drafter(start).target_layer_ids
    features = Features(answers, target, ids, None if args.no_cache else cache_folder(folder.name, ids, answers))
    data = Data(answers, features, options)
    scale = feature_scale(torch.cat([features.batch([i])[0, 1:] for i in data.trained[:64]])).to(device)
    if start is None:
        vocabulary = draft_vocabulary(answers, target.config.vocab_size, options.draft_vocabulary)
        student = Student.new(options, target, vocabulary.to(device), scale)
    else:
        student = Student.load(start, target, scale, options.block_size)
    first = Student.load(first_path, target) if first_path else None
    Trainer(student, first, data, options, output, device).run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
