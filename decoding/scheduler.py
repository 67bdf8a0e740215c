"""Which sequences are decoded together, and when a waiting one joins them."""

from collections import deque

from decoding.cycle import Decoder
from decoding.sequence import Finish, Sequence

PIECE = 128  # tokens of a prompt a cycle


class Scheduler:
    """Continuous batching: a sequence joins as soon as a slot is free, and leaves as soon as it is finished.

    Args:
        slots: sequences open at once.
    """

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self.decoder, self.slots = decoder, slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence, why: Finish) -> None:
        """End a sequence from outside (a stop word, a client that left)."""
        sequence.finish = why
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> list[tuple[Sequence, list[int]]]:
        """Let the finished go, admit what fits, run one cycle. Returns each sequence that answers, and its new tokens."""
        for sequence in [s for s in self.running if s.finish]:
            self.decoder.close(sequence)
            self.running.remove(sequence)
        while self.waiting and len(self.running) < self.slots and self.decoder.room(self.waiting[0]):
            self.decoder.open(self.waiting[0])
            self.running.append(self.waiting.popleft())
        answering = [s for s in self.running if s.computed == s.position]
        pieces = [(s, min(PIECE, s.position - s.computed)) for s in self.running if s.computed < s.position]
        return list(zip(answering, self.decoder.cycle(answering, pieces), strict=True))

    def reset(self) -> None:
        """Forget all sequences, after an engine failed."""
        self.waiting.clear()
        self.running.clear()
        self.decoder.reset()
