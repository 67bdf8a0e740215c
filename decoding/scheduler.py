"""What a cycle does: which answers it advances, how much of which prompts it takes in, and who has to wait."""

import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from decoding.cycle import Decoder, Piece
from decoding.engines import Costs
from decoding.sequence import Finish, Sequence

ALONE = 128  # prompt tokens of a cycle that no answer waits for: a client that leaves is rid of within it
LEAST = 8  # prompt tokens of a cycle, whatever they cost, so that a newcomer always gets on
MOST = 512
PATIENCE = 0.1  # seconds of a cycle with prompts, at most, unless its answers take as long without


class Full(RuntimeError):
    """As many sequences wait as may; the message is for the client."""


class Scheduler:
    """Continuous batching: a cycle advances every answer, and takes in as much of the newcomers' prompts as may ride along.

    Newcomers are taken in by order of arrival: the budget of a cycle goes to the first one's prompt and what is left of it to
    the next, so that short ones come in together and none is passed over. A newcomer is opened when its turn comes and not
    before; by then those ahead have computed what its prompt has in common with theirs.

    Args:
        slots: sequences open at once, at most; memory may hold fewer.
        costs: of a pass of the target on this machine; None where nobody waits for the next token of an answer.
        queue: sequences that may wait for a place; None for any number.

    Attributes:
        waiting: by order of arrival. running: opened, by order of arrival.
        prompt_tokens: of all sequences that were opened. reused_tokens: those of them that the engine knew already.
    """

    def __init__(self, decoder: Decoder, slots: int, costs: Costs | None = None, queue: int | None = None) -> None:
        self.decoder, self.slots, self.costs, self.queue = decoder, slots, costs, queue
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prompt_tokens, self.reused_tokens = 0, 0
        self._rows = 1.0  # that an answer has verified, in the last cycle

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn.

        Raises:
            Full: too many do already.
        """
        free = self.slots - len(self.running) if not self.running or self.decoder.room(sequence) else 0
        if self.queue is not None and len(self.waiting) >= free + self.queue:
            raise Full(f"limits.waiting: found {self.queue} requests waiting for a place, allowed: no more; try again later")
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence, why: Finish) -> None:
        """End a sequence from outside (a stop word, a client that left). The next step frees what it holds."""
        sequence.finish = why
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> list[tuple[Sequence, list[int]]]:
        """Let the finished go, take newcomers in, run one cycle. Returns each sequence that answers, and its new tokens.

        Where it raises, the running sequences are lost (``reset``).
        """
        self._let_go()
        newcomers = self.waiting or any(s.computed < s.position for s in self.running)
        pieces = self._take_in(self._budget()) if newcomers else []
        if not self.running:
            return []
        answering = self._answering()
        committed = self.decoder.cycle(answering, pieces)
        if answering:
            self._rows = max(1.0, self.decoder.verified / len(answering))
        return list(zip(answering, committed, strict=True))

    def reset(self) -> None:
        """Forget the running sequences, after an engine failed; those that wait have lost nothing."""
        self.running.clear()
        self.decoder.reset()

    def _let_go(self) -> None:
        now = time.monotonic()
        for sequence in (*self.waiting, *self.running):
            if not sequence.finish and now >= sequence.deadline:
                self.drop(sequence, "timeout")
        for sequence in [s for s in self.running if s.finish]:
            self.running.remove(sequence)
            self.decoder.close(sequence)

    def _answering(self) -> list[Sequence]:
        return [s for s in self.running if s.computed == s.position]

    def _budget(self) -> int:
        """Prompt tokens of a cycle: no answer may wait for it longer than for two cycles of all that are to be answered."""
        answering = self._answering()
        if not answering or not self.costs:
            return ALONE
        context = sum(s.computed for s in self.running)
        wanting = min(self.slots, len(self.running) + len(self.waiting))
        rows, usual = (np.array([round(self._rows * count)]) for count in (len(answering), wanting))
        allowed = min(2 * self.costs.target(usual, wanting, context)[0], PATIENCE)
        counts = np.arange(MOST + 1)
        if self.decoder.target.ragged:
            seconds = self.costs.target(rows + counts, len(answering) + 1, context)
        else:  # prompts have passes of their own
            seconds = self.costs.target(rows, len(answering), context) + self.costs.target(counts, 1, context)
        return max(LEAST, int(np.flatnonzero(seconds <= allowed).max(initial=0)))

    def _take_in(self, budget: int) -> list[Piece]:
        pieces = []
        for sequence in self._newcomers():
            if count := min(budget, sequence.position - sequence.computed):
                pieces.append((sequence, count))
            budget -= count
            if not budget:
                break
        return pieces

    def _newcomers(self) -> Iterator[Sequence]:
        """Those whose prompts are not in the cache yet; one that waits is opened when it is asked for."""
        yield from [s for s in self.running if s.computed < s.position]
        while self.waiting and len(self.running) < self.slots:
            if self.running and not self.decoder.room(self.waiting[0]):
                return  # where nothing runs there is room, or there never will be: the engine says so when it is opened
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self.decoder.open(sequence)
            self.prompt_tokens += len(sequence.prompt)
            self.reused_tokens += sequence.computed
            yield sequence
