"""A decoder of which only the pace matters, for those who plan its cycles."""

from dataclasses import dataclass

import numpy as np

from decoding.sequence import Sequence


@dataclass
class Engine:
    ragged: bool


class Decoder:
    """Commits one token a cycle and sequence, and checks what it is asked.

    Args:
        memory: rows of all sequences together. knows: tokens of every prompt that need not be computed.
        verifies: rows a sequence and cycle. breaks: cycles that fail.
    """

    def __init__(self, memory: int = 10**9, knows: int = 0, verifies: int = 1, ragged: bool = True, breaks: int = 0) -> None:
        self.memory, self.knows, self.verifies, self.breaks = memory, knows, verifies, breaks
        self.target = Engine(ragged)
        self.held: dict[Sequence, int] = {}
        self.verified = 0
        self.log: list[tuple[list[Sequence], list[tuple[Sequence, int]]]] = []

    def room(self, sequence):
        return sum(self.held.values()) + len(sequence.prompt) + sequence.max_tokens <= self.memory

    def open(self, sequence):
        assert sequence not in self.held
        assert self.room(sequence)
        self.held[sequence] = len(sequence.prompt) + sequence.max_tokens
        sequence.computed = min(self.knows, sequence.position)

    def close(self, sequence):
        del self.held[sequence]

    def reset(self):
        self.held.clear()

    def cycle(self, sequences, pieces=()):
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("out of order")
        assert all(s in self.held and not s.finish and s.computed == s.position for s in sequences)
        assert all(s in self.held and not s.finish and 0 < n <= s.position - s.computed for s, n in pieces)
        assert len({*sequences, *(s for s, _ in pieces)}) == len(sequences) + len(pieces) > 0
        self.log.append((list(sequences), list(pieces)))
        self.verified = self.verifies * len(sequences)
        for sequence, count in pieces:
            sequence.computed += count
        for sequence in sequences:
            sequence.commit([7])
            sequence.computed += 1
        return [[7] for _ in sequences]


class Costs:
    """A pass takes what 16 rows take at least, a millisecond."""

    def target(self, rows, sequences, context):
        return np.maximum(rows, 16) / 16e3
