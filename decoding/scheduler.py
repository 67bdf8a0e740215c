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

    def step(self) -> list[tuple[Sequence, list[int]]]:
        """Let the finished go, admit what fits, run one cycle. Returns each running sequence and its new tokens."""
        self._refill()
        if not self.running:
            return []
        committed = self.decoder.cycle(self.running, self.mode)
        return list(zip(self.running, committed, strict=True))

    def reset(self) -> None:
        """Forget all sequences, after an engine failed."""
        self.waiting.clear()
        self.running.clear()
        self.decoder.reset()

    def _refill(self) -> None:
        """A waiting sequence takes the place of a finished one, so that the others' caches stay where they are."""
        for place in reversed(range(len(self.running))):
            if not self.running[place].finish:
                continue
            if self._may_join():
                self.running[place] = self._join(place)
            else:
                self.decoder.leave(place)
                del self.running[place]
        while len(self.running) < self.slots and self._may_join():
            self.running.append(self._join(None))

    def _may_join(self) -> bool:
        if not self.waiting:
            return False
        alone = all(sequence.finish for sequence in self.running)
        return alone or (self.waiting[0].mode or self.default_mode) == self.mode

    def _join(self, place: int | None) -> Sequence:
        sequence = self.waiting.popleft()
        self.mode = sequence.mode or self.default_mode
        self.decoder.join(sequence, self.mode, place)
        return sequence
