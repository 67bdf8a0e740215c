"""A target that repeats answers it gave before: greedy modes are lossless, so one answer serves to measure them all.

What a mode drafts depends on the committed tokens and the target's features of them alone. Both are known once the target
has answered, so acceptance lengths follow without another pass of it, and are those of a real run (up to rounding).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoding.engines import Bools, DrafterEngine, Features, Floats, Ints
from decoding.sampling import Sampling
from training.corpus import Answer


@dataclass
class Record:
    """What was seen while an answer was decoded, a row a cycle.

    Attributes:
        nodes: tokens verified. confidences: ``[γ-1]`` of the first draft. correct: ``[γ-1]``, which of its tokens are the
            target's; where the answer has ended, neither counts (``known``).
    """

    nodes: list[int] = field(default_factory=list)
    confidences: list[NDArray[np.float32]] = field(default_factory=list)
    correct: list[NDArray[np.bool_]] = field(default_factory=list)
    known: list[NDArray[np.bool_]] = field(default_factory=list)


@dataclass
class Replay:
    """An answer on its way through the engines."""

    answer: Answer
    features: Floats  # [len(answer), F]
    record: Record
    length: int = 0  # tokens in the cache


class ReplayTarget:
    """A ``TargetEngine`` over known answers, in the order in which their sequences will join."""

    def __init__(self) -> None:
        self.waiting: deque[Replay] = deque()
        self.running: list[Replay] = []

    def expect(self, answer: Answer, features: Floats, record: Record) -> None:
        """Announce an answer; its sequence must be the next one to join behind those announced before."""
        self.waiting.append(Replay(answer, features, record))

    def prefill(self, token_ids: Ints, positions: Ints, mask: Bools) -> Floats:
        replay, n = self.waiting[0], token_ids.shape[1]
        assert token_ids[0].tolist() == replay.answer.tokens[replay.length : replay.length + n]
        replay.length += n
        return replay.features[replay.length - n : replay.length]

    def join(self, place: int | None) -> None:
        if place is None:
            self.running.append(self.waiting.popleft())
        else:
            self.running[place] = self.waiting.popleft()

    def leave(self, sequence: int) -> None:
        del self.running[sequence]

    def reset(self) -> None:
        self.waiting.clear()
        self.running.clear()

    def send(self, array: NDArray) -> NDArray:
        return array

    def read(self, array: NDArray) -> NDArray:
        return array

    def forward(self, token_ids: Ints, positions: Ints, mask: Bools) -> "ReplayPass":
        for replay, seen in zip(self.running, mask, strict=True):
            replay.record.nodes.append(int(seen.any(-1).sum()))
        return ReplayPass(list(self.running), positions)

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        for replay, kept in zip(self.running, rows, strict=True):
            replay.length += len(kept)


@dataclass(frozen=True)
class ReplayPass:
    """What the target said next at each position, and its features there; void for a node off the answer's path."""

    running: list[Replay]
    positions: Ints

    def choose(self, nodes: Ints, sampling: Sequence[Sampling], uniforms: NDArray[np.float64]) -> Ints:
        chosen = np.zeros_like(nodes)
        for b, node in enumerate(nodes):
            tokens, place = self.running[b].answer.tokens, int(self.positions[b, node]) + 1
            chosen[b] = tokens[place] if node >= 0 and place < len(tokens) else 0
        return chosen

    def features(self, sequence: int, nodes: Sequence[int]) -> Floats:
        replay = self.running[sequence]
        return replay.features[np.minimum(self.positions[sequence, nodes], len(replay.answer.tokens) - 1)]


class HostDrafter:
    """A drafter whose drafts come into the host's memory, where the replayed target's tokens lie."""

    def __init__(self, drafter: DrafterEngine) -> None:
        self.drafter = drafter
        self.prefill, self.join, self.leave, self.reset = drafter.prefill, drafter.join, drafter.leave, drafter.reset
        self.send, self.read = drafter.send, drafter.read

    @property
    def mask_id(self) -> int:
        return self.drafter.mask_id

    def forward(
        self, features: Sequence[Features | None], block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        candidates, confidences = self.drafter.forward(features, block_ids, positions, mask)
        return self.read(candidates), self.read(confidences)


class RecordingDrafter(HostDrafter):
    """A first drafter whose drafts are compared with what the replayed target says."""

    def __init__(self, drafter: DrafterEngine, target: ReplayTarget, block_size: int) -> None:
        super().__init__(drafter)
        self.target, self.block_size = target, block_size

    def forward(
        self, features: Sequence[Features | None], block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        candidates, confidences = super().forward(features, block_ids, positions, mask)
        if block_ids.shape[1] == self.block_size and (block_ids[:, 1:] == self.mask_id).all():
            for b, replay in enumerate(self.target.running):
                tokens = np.array(replay.answer.tokens)
                place = positions[b, 1:]
                known = place < len(tokens)
                truth = tokens[np.minimum(place, len(tokens) - 1)]
                replay.record.confidences.append(confidences[b, 1:, 0].copy())
                replay.record.correct.append((candidates[b, 1:, 0] == truth) & known)
                replay.record.known.append(known)
        return candidates, confidences
