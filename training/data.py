"""Batches of answers for training and validation."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from export.config import TrainingSection
from training.corpus import Answer
from training.features import Features

HELD_OUT = 64  # every 64th answer is kept for validation


@dataclass
class Batch:
    """Some answers, right-padded.

    tokens ``[S, L]`` int64, lengths ``[S]`` int64, features ``[S, L, F]`` f32; last ``[S, L, H]`` f32, the normed last hidden
    states, unless the loss looks at tokens alone.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    features: Tensor
    last: Tensor | None
    generator: torch.Generator  # of what is drawn for this batch


class Data:
    """Groups answers into batches of about ``options.blocks`` blocks.

    Epoch e's batches, and what is drawn for batch i of it, follow from (seed, e, i) alone.
    """

    def __init__(self, answers: list[Answer], features: Features, options: TrainingSection) -> None:
        self.answers, self.features, self.options = answers, features, options
        self.held_out = list(range(0, len(answers), HELD_OUT))
        self.trained = [i for i in range(len(answers)) if i % HELD_OUT]

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch. Answers of like length go together, so that little of a batch is padding."""
        shuffle = random.Random(f"{self.options.seed}/{number}")
        order = sorted(self.trained, key=lambda i: len(self.answers[i].response_ids) * shuffle.uniform(0.9, 1.1))
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

    def load(self, indices: list[int], seed: str, device: torch.device) -> Batch:
        """Put answers on the device."""
        chosen = [self.answers[i] for i in indices]
        lengths = torch.tensor([len(answer) for answer in chosen])
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for row, answer in enumerate(chosen):
            tokens[row, : len(answer)] = torch.tensor(answer.tokens)
        return Batch(
            tokens.to(device),
            torch.tensor([len(answer.prompt_ids) for answer in chosen]).to(device),
            lengths.to(device),
            self.features.batch(indices).to(device).float(),
            None if self.options.loss == "tokens" else self.features.last(indices).to(device).float(),
            torch.Generator().manual_seed(random.Random(seed).getrandbits(63)),
        )
