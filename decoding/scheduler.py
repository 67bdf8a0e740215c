"""Which sequences are decoded together, and when a waiting one joins them."""

from collections import deque

from decoding.cycle import Decoder
from decoding.modes import ModeName
from decoding.sequence import Finish, Sequence


class Scheduler:
    """Continuous batching: a sequence joins as soon as a slot is free, and leaves as soon as it is finished.

    The running sequences share a decoding mode; a sequence of another mode waits until they are done.

    Args:
        slots: sequences decoded together, at most.
        mode: of sequences that name none.
    """

    def __init__(self, decoder: Decoder, slots: int, mode: ModeName) -> None:
        self.decoder, self.slots, self.default_mode = decoder, slots, mode
        self.mode = mode
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
        if sequence in self.running:
            self._release(sequence)

    def step(self) -> list[tuple[Sequence, list[int]]]:
        """Admit what fits, run one cycle, and let the finished go. Returns each running sequence's new tokens."""
        self._admit()
        if not self.running:
            return []
        batch = list(self.running)
        committed = self.decoder.cycle(batch, self.mode)
        for sequence in batch:
            if sequence.finish:
                self._release(sequence)
        return list(zip(batch, committed, strict=True))

    def reset(self) -> None:
        """Forget all sequences, after an engine failed."""
        self.waiting.clear()
        self.running.clear()
        self.decoder.reset()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            mode = self.waiting[0].mode or self.default_mode
            if self.running and mode != self.mode:
                return
            self.mode = mode
            sequence = self.waiting.popleft()
            self.decoder.join(sequence, mode)
            self.running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        place = self.running.index(sequence)
        self.decoder.leave(place)
        del self.running[place]
