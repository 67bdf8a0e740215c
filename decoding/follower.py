"""A drafter beside the target: it learns of committed tokens by the target's features, and only when it drafts."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np

from decoding.engines import Array, Bools, DrafterEngine, Ints, TargetEngine
from decoding.sequence import Sequence

Ran = Callable[[int, int, int, float], None]
CATCH_UP = 256  # rows of features a call, at most


class Follower:
    """A drafter engine whose sequences are the target's.

    Args:
        numbers: what the target calls each sequence; its owner goes on changing it.
        block_size: γ. ran: called with each call's rows, sequences, context and seconds.
    """

    def __init__(
        self, engine: DrafterEngine, target: TargetEngine, numbers: dict[Sequence, int], block_size: int, ran: Ran
    ) -> None:
        self.engine, self.target, self.block_size, self.ran = engine, target, block_size, ran
        self.leaders = numbers
        self.numbers: dict[Sequence, int] = {}

    def open(self, sequence: Sequence, rows: int) -> None:
        self.numbers[sequence] = self.engine.open(sequence.tokens, rows)

    def close(self, sequence: Sequence) -> None:
        """End a sequence, if it was opened."""
        if sequence in self.numbers:
            self.engine.close(self.numbers.pop(sequence))

    def reset(self) -> None:
        self.numbers.clear()
        self.engine.reset()

    def lag(self, sequence: Sequence) -> int:
        """Tokens in the target's cache that the drafter has not seen."""
        return self.target.length(self.leaders[sequence]) - self.engine.length(self.numbers[sequence])

    def draft(self, sequences: Many[Sequence], block_ids: Array) -> tuple[Array, Array]:
        """Catch up with the target, then run blocks.

        Args:
            block_ids: ``[B, W·γ]``, W blocks of each sequence, blind to each other, each behind all that is committed.

        Returns:
            candidates ``[B, W·γ, A]``, best first, and their probabilities; the next call overwrites both.
        """
        while self.catch_up(sequences):
            pass
        return self._run(sequences, block_ids)

    def catch_up(self, sequences: Many[Sequence]) -> list[Sequence]:
        """Go a call nearer to the target with those that are further behind it than a call goes; returns these."""
        behind = [s for s in sequences if self.lag(s) > CATCH_UP]
        if behind:
            self._run(behind, np.zeros((len(behind), 0), dtype=np.int64))
        return behind

    def _run(self, sequences: Many[Sequence], block_ids: Array) -> tuple[Array, Array]:
        numbers = [self.numbers[s] for s in sequences]
        features = []
        for number, sequence in zip(numbers, sequences, strict=True):
            start, stop = self.engine.length(number), self.target.length(self.leaders[sequence])
            features.append(self.target.features(self.leaders[sequence], start, min(stop, start + CATCH_UP)))
        blocks = block_ids.shape[1] // self.block_size
        places = np.tile(np.arange(self.block_size), blocks)
        positions: Ints = np.add.outer([s.position for s in sequences], places).astype(np.int64)
        own: Bools = np.kron(np.eye(blocks, dtype=bool), np.ones((self.block_size, self.block_size), dtype=bool))
        mask = np.broadcast_to(own, (len(sequences), *own.shape))
        context = sum(self.engine.length(number) for number in numbers)
        began = time.perf_counter()
        made = self.engine.forward(numbers, features, block_ids, positions, mask)
        rows = sum(map(len, features)) + block_ids.shape[0] * block_ids.shape[1]
        self.ran(rows, len(sequences), context, time.perf_counter() - began)
        return made
