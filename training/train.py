"""``python -m training.train pipeline.yaml --drafter dflash|vp``: train a drafter for the pipeline's target.

On a CPU, a GPU, or several under ``torchrun``. The whole state is written at every validation: a run that was killed goes
on from there to the weights that it would have reached.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from export import checkpoints
from export.config import TrainingSection, UserError, load
from training.blocks import Blocks, discount, sample_anchors
from training.corpus import read_corpus
from training.data import Batch, Data
from training.drafting import Drafting
from training.features import Features, cache_folder
from training.losses import ban, weighted_cross_entropy
from training.muon import Muon
from training.precision import fast_bf16, precision
from training.student import Student, draft_vocabulary, feature_scale
from training.validation import Validation

VALIDATE_EVERY, VALIDATIONS = 100, 20  # steps at least between two validations; validations a run at most
SAVE_EVERY = 180  # seconds, between validations
TIMED = 40  # steps, after which a run of so many minutes knows how many it has time for
WARM_UP, DECAY = 0.03, 0.4  # shares of the run in which the learning rate rises from 0, and falls to 0


class Trainer:
    """A student, its optimisers and the running average of its weights.

    Args:
        first: the trained first drafter, whose rejections a VP-Drafter learns from; None trains DFlash itself.
        output: folder of the state, the logs and the drafter.
        minutes: train for about so long instead of ``options.steps``.

    Attributes:
        steps: of the whole run. blocks: seen so far on this device.
    """

    def __init__(
        self,
        student: Student,
        first: Student | None,
        data: Data,
        options: TrainingSection,
        output: Path,
        device: torch.device,
        minutes: float | None = None,
    ) -> None:
        self.student = student.to(device)
        self.drafting = Drafting(self.student, first.to(device).eval() if first else None, options, device)
        self.data, self.options, self.output, self.device = data, options, output, device
        self.validation = Validation(self.drafting, data)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.step = self.epoch = self.offset = self.blocks = 0
        self.steps, self.minutes = options.steps, minutes
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
        done = (self.step + 1) / self.steps
        return min(1.0, done / WARM_UP, max(0.0, (1 - done) / DECAY) + 1e-3)

    def run(self) -> None:
        """Train to the end, going on from a saved state if there is one."""
        self.restore()
        with SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step) as board:
            if self.step == 0:  # what training starts from, against which all later validations stand
                self.log({"step": 0} | self.validate(), board)
            began = saved = warm = time.monotonic()
            seen = self.blocks
            while self.step < self.steps:
                record: dict[str, Any] = {"step": self.step + 1, "epoch": self.epoch, "loss": round(self.train_step(), 4)}
                now = time.monotonic()
                if self.step == TIMED // 2:
                    warm = now
                elif self.step == TIMED and self.minutes is not None:
                    left = began + 60 * self.minutes - now
                    self.steps = self.agreed(self.step + max(1, int(left / (now - warm) * (TIMED - TIMED // 2))))
                record |= {"blocks": self.blocks, "rate": self.rate()}
                record["blocks_per_second"] = round((self.blocks - seen) / (now - began), 1)
                if self.step % max(VALIDATE_EVERY, self.steps // VALIDATIONS) == 0 or self.step == self.steps:
                    record |= self.validate()
                    self.save()
                    saved = time.monotonic()
                elif now - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
                self.log(record, board)

    def agreed(self, steps: int) -> int:
        """The first device's number, on all of them."""
        if self.world == 1:
            return steps
        shared = torch.tensor(steps, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared)

    def train_step(self) -> float:
        """One update. Returns the loss."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.options.learning_rate * self.rate()
            optimiser.zero_grad(set_to_none=True)
        loss = 0.0
        for _ in range(self.options.accumulate):
            batch = self.next_batch()
            anchors = sample_anchors(batch.prompt_lengths.cpu(), batch.lengths.cpu(), self.options.anchors, batch.generator)
            with precision(self.device):
                part = self.loss(batch, anchors.to(self.device)) / self.options.accumulate
            part.backward()
            loss += float(part.detach())
            self.blocks += int((anchors >= 0).sum())
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
        return loss

    def next_batch(self) -> Batch:
        """This device's next batch; every epoch's order is another."""
        groups = self.data.epoch(self.epoch)
        if self.offset + self.world > len(groups):
            self.epoch, self.offset = self.epoch + 1, 0
            groups = self.data.epoch(self.epoch)
        number = self.offset + self.rank
        self.offset += self.world
        with precision(self.device):  # of the target's pass, too
            return self.data.load(groups[number], f"{self.options.seed}/{self.epoch}/{number}", self.device)

    def loss(self, batch: Batch, anchors: Tensor) -> Tensor:
        """Mean over blocks of the weighted cross-entropy of their masked places."""
        blocks, banned = self.drafting.lay(batch, anchors, self.options.rejections)
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

    def validate(self) -> dict[str, float]:
        """What the averaged weights are worth on held-out answers."""
        with self.averaged():
            return self.validation.lengths()

    def averaged(self) -> "Averaged":
        return Averaged(list(self.student.parameters()), self.average)

    def save(self) -> None:
        """Write the state to go on from, then the drafter as it is now."""
        if self.rank:
            return
        state = {
            "progress": (self.step, self.epoch, self.offset, self.blocks),
            "steps": self.steps if self.minutes is not None else None,
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
        self.step, self.epoch, self.offset, self.blocks = state["progress"]
        self.steps = state["steps"] or self.steps
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
    parser.add_argument(
        "--minutes", type=minutes, help="train for about so long: training.steps is found out in the first of them, and kept"
    )
    parser.add_argument("--no-cache", action="store_true", help="compute the target's features anew each epoch")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (UserError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def minutes(text: str) -> float:
    """A time that is one: more than nothing."""
    found = float(text)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, allowed: a number of minutes above 0")
    return found


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
    Trainer(student, first, data, options, output, device, args.minutes).run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
