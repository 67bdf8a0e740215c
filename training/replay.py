"""A target that repeats answers it gave before: greedy modes are lossless, so one answer serves to measure them all.

What a mode drafts depends on the committed tokens and the target's features of them alone. Both are known once the target
has answered, so acceptance lengths follow without another pass of it, and are those of a real run (up to rounding).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoding.acceptance import Walk
from decoding.engines import Bools, DrafterEngine, Features, Floats, Ints
from decoding.sampling import Sampling
from training.corpus import Answer

ROWS = 16  # of a best-first tree that names none


@dataclass
class Record:
    """What was seen while an answer was decoded, a row a cycle.

    Attributes:
        nodes: tokens verified. expected: tokens that the tree promised; 0 where it says nothing. said: tokens committed.
        origins: of the accepted tokens, one number each (``sources.ORIGINS``); 0 where nobody says.
        confidences: ``[γ-1]`` of the first draft. correct: ``[γ-1]``, which of its tokens are the target's; where the answer
            has ended, neither counts (``known``).
    """

    nodes: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    confidences: list[NDArray[np.float32]] = field(default_factory=list)
    correct: list[NDArray[np.bool_]] = field(default_factory=list)
    known: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, walk: Walk) -> None:
        self.expected.append(sum(walk.values))
        self.said.append(len(walk.said))
        self.origins += [walk.origins[node] for node in walk.accepted[1:]]


@dataclass
class Replay:
    """An answer on its way through the engines."""

    answer: Answer
    features: Floats  # [len(answer), F]
    record: Record
    length: int = 0  # tokens in the cache


class ReplayTarget:
    """A ``TargetEngine`` over known answers, in the order in which their sequences will be opened."""

    ragged = True

    def __init__(self) -> None:
        self.waiting: deque[Replay] = deque()
        self.running: dict[int, Replay] = {}
        self.opened = 0
        self.last: list[Replay] = []

    def expect(self, answer: Answer, features: Floats, record: Record) -> None:
        """Announce an answer; its sequence must be the next one to be opened behind those announced before."""
        self.waiting.append(Replay(answer, features, record))

    used = 0.0

    def room(self, rows: int) -> bool:
        return True

    def open(self, tokens: list[int], rows: int, fresh: bool = False) -> int:
        self.opened += 1
        self.running[self.opened] = self.waiting.popleft()
        assert tokens == self.running[self.opened].answer.prompt_ids
        return self.opened

    def length(self, sequence: int) -> int:
        return self.running[sequence].length

    def close(self, sequence: int) -> None:
        del self.running[sequence]

    def reset(self) -> None:
        self.waiting.clear()
        self.running.clear()

    def send(self, array: NDArray) -> NDArray:
        return array

    def read(self, array: NDArray) -> NDArray:
        return array

    def forward(
        self,
        sequences: Sequence[int],
        token_ids: Ints,
        positions: Ints,
        mask: Bools,
        counts: Sequence[int],
        silent: int = 0,
    ) -> "ReplayPass":
        self.last = [self.running[sequence] for sequence in sequences]
        for replay, count in zip(self.last[: len(self.last) - silent], counts, strict=False):
            replay.record.nodes.append(count)
        return ReplayPass(self.last, positions)

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        for replay, kept in zip(self.last, rows, strict=True):
            replay.length += len(kept)

    def features(self, sequence: int, start: int, stop: int) -> Features:
        return self.running[sequence].features[start:stop]


@dataclass(frozen=True)
class ReplayPass:
    """What the target said next at each position; void for a node off the answer's path."""

    running: list[Replay]
    positions: Ints

    def choose(self, nodes: Ints, sampling: Sequence[Sampling], uniforms: NDArray[np.float64]) -> Ints:
        chosen = np.zeros_like(nodes)
        for b, node in enumerate(nodes):
            tokens, place = self.running[b].answer.tokens, int(self.positions[b, node]) + 1
            chosen[b] = tokens[place] if node >= 0 and place < len(tokens) else 0
        return chosen

    def log_probabilities(
        self, row: int, nodes: Sequence[int], tokens: Sequence[int], top: int
    ) -> tuple[NDArray[np.float64], Ints, NDArray[np.float64]]:
        raise NotImplementedError("of a replayed answer it is known what was said, not how likely it was")


class HostDrafter:
    """A drafter whose drafts come into the host's memory, where the replayed target's tokens lie."""

    def __init__(self, drafter: DrafterEngine) -> None:
        self.drafter = drafter
        self.room, self.open, self.length = drafter.room, drafter.open, drafter.length
        self.close, self.reset, self.send, self.read = drafter.close, drafter.reset, drafter.send, drafter.read

    @property
    def mask_id(self) -> int:
        return self.drafter.mask_id

    def forward(
        self, sequences: Sequence[int], features: Sequence[Features], block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        candidates, confidences = self.drafter.forward(sequences, features, block_ids, positions, mask)
        return self.read(candidates), self.read(confidences)


class RecordingDrafter(HostDrafter):
    """A first drafter whose drafts are compared with what the replayed target says."""

    def __init__(self, drafter: DrafterEngine, target: ReplayTarget, block_size: int) -> None:
        super().__init__(drafter)
        self.target, self.block_size = target, block_size
        self.replays: dict[int, Replay] = {}
        self.open = self._open

    def _open(self, tokens: list[int], rows: int) -> int:
        """A drafter opens a sequence when the target has."""
        number = self.drafter.open(tokens, rows)
        self.replays[number] = self.target.running[self.target.opened]
        return number

    def forward(
        self, sequences: Sequence[int], features: Sequence[Features], block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        candidates, confidences = super().forward(sequences, features, block_ids, positions, mask)
        if block_ids.shape[1] == self.block_size and (block_ids[:, 1:] == self.mask_id).all():
            for b, sequence in enumerate(sequences):
                replay = self.replays[sequence]
                tokens = np.array(replay.answer.tokens)
                place = positions[b, 1:]
                known = place < len(tokens)
                truth = tokens[np.minimum(place, len(tokens) - 1)]
                replay.record.confidences.append(confidences[b, 1:, 0].copy())
                replay.record.correct.append((candidates[b, 1:, 0] == truth) & known)
                replay.record.known.append(known)
        return candidates, confidences
