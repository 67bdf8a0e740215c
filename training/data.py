"""Batches of answers for training and validation."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from export.config import TrainingSection
from training.corpus import Answer
from training.features import Features
from training.foreseen import foreseen

HELD_OUT = 64  # every 64th answer is kept for validation


@dataclass
class Batch:
    """Some answers, right-padded.

    tokens ``[S, L]`` int64, lengths ``[S]`` int64, features ``[S, L, F]`` f32; last ``[S, L, H]`` f32, the normed last hidden
    states, unless the loss looks at tokens alone; foreseen ``[S, L]`` int64, how many tokens behind each one a lookup gets
    right, unless those weigh as much as others.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    features: Tensor
    last: Tensor | None
    foreseen: Tensor | None
    generator: torch.Generator  # of what is drawn for this batch


class Data:
    """Groups answers into batches of about ``options.blocks`` blocks.

    Epoch e's batches, and what is drawn for batch i of it, follow from (seed, e, i) alone.

    Raises:
        ValueError: ``options.shares`` names a task that no answer has or, when an epoch is asked for, leaves none.
    """

    def __init__(self, answers: list[Answer], features: Features, options: TrainingSection) -> None:
        self.answers, self.features, self.options = answers, features, options
        self.held_out = list(range(0, len(answers), HELD_OUT))
        self.trained = [i for i in range(len(answers)) if i % HELD_OUT]
        tasks = {answer.task for answer in answers}
        for task in sorted(options.shares.keys() - tasks):
            raise ValueError(f"training.shares.{task}: found a task that no answer has, allowed: {', '.join(sorted(tasks))}")

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch. Answers of like length go together, so that little of a batch is padding.

        An answer comes as often as ``options.shares`` says; of a share of 1.5 half come once and half twice.
        """
        shuffle = random.Random(f"{self.options.seed}/{number}")
        shown = [i for i in self.trained for _ in range(int(self.share(i) + shuffle.random()))]
        if not shown:
            raise ValueError("training.shares: found shares that show no answer, allowed: such as show one in each epoch")
        order = sorted(shown, key=lambda i: len(self.answers[i].response_ids) * shuffle.uniform(0.9, 1.1))
        groups: list[list[int]] = [[]]
        blocks = 0
        for i in order:
            if blocks >= self.options.blocks:
                groups.append([])
                blocks = 0
            groups[-1].append(i)
            blocks += min(len(self.answers[i].response_ids), self.options.anchors)
        shuffle.shuffle(groups)
        return groups

    def share(self, i: int) -> float:
        """How often an epoch shows answer i."""
        answer, options = self.answers[i], self.options
        return options.shares.get(answer.task, 1.0) * (options.sampled if answer.temperature > 0 else 1.0)

    def load(self, indices: list[int], seed: str, device: torch.device) -> Batch:
        """Put answers on the device."""
        chosen = [self.answers[i] for i in indices]
        lengths = torch.tensor([len(answer) for answer in chosen])
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        known = torch.zeros_like(tokens) if self.options.foreseen < 1 else None
        for row, answer in enumerate(chosen):
            tokens[row, : len(answer)] = torch.tensor(answer.tokens)
            if known is not None:
                known[row, : len(answer)] = torch.tensor(foreseen(answer))
        return Batch(
            tokens.to(device),
            torch.tensor([len(answer.prompt_ids) for answer in chosen]).to(device),
            lengths.to(device),
            self.features.batch(indices).to(device).float(),
            None if self.options.loss == "tokens" else self.features.last(indices).to(device).float(),
            None if known is None else known.to(device),
            torch.Generator().manual_seed(random.Random(seed).getrandbits(63)),
        )
