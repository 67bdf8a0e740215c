"""A target that repeats answers it gave before: greedy modes are lossless, so one answer serves to measure them all.

What a mode drafts depends on the committed tokens and the target's features of them alone. Both are known once the target
has answered, so acceptance lengths follow without another pass of it, and are those of a real run (up to rounding).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from decoding.engines import Bools, DrafterEngine, Floats, Ints
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
    """A ``TargetEngine`` over known answers, in the order in which their sequences will join.

    Args:
        vocabulary: V.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.waiting: deque[Replay] = deque()
        self.running: list[Replay] = []
        self._logits = np.zeros((0, 0, vocabulary), np.float32)

    def expect(self, answer: Answer, features: Floats, record: Record) -> None:
        """Announce an answer; its sequence must be the next one to join behind those announced before."""
        self.waiting.append(Replay(answer, features, record))

    def prefill(self, token_ids: Ints, positions: Ints, mask: Bools) -> Floats:
        replay, n = self.waiting[0], token_ids.shape[1]
        assert token_ids[0].tolist() == replay.answer.tokens[replay.length : replay.length + n]
        replay.length += n
        return replay.features[None, replay.length - n : replay.length]

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

    def forward(self, token_ids: Ints, positions: Ints, mask: Bools) -> tuple[Floats, Floats]:
        """Logits that say what the target said next at each position; for a node off the answer's path they are void."""
        batch, n = token_ids.shape
        if self._logits.shape[0] < batch or self._logits.shape[1] < n:
            self._logits = np.zeros((batch, n, self.vocabulary), np.float32)
        logits = self._logits[:batch, :n]
        features = np.zeros((batch, n, self.running[0].features.shape[1]), np.float32)
        self._said = []
        for b, replay in enumerate(self.running):
            tokens = replay.answer.tokens
            place = np.minimum(positions[b], len(tokens) - 1)
            said = np.array([*tokens[1:], 0])[place]
            self._said.append((b, np.arange(n), said))
            logits[b, np.arange(n), said] = 1
            features[b] = replay.features[place]
            replay.record.nodes.append(int(mask[b].any(-1).sum()))
        return logits, features

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        for entries in self._said:
            self._logits[entries] = 0
        for replay, kept in zip(self.running, rows, strict=True):
            replay.length += len(kept)


class RecordingDrafter:
    """A first drafter whose drafts are compared with what the replayed target says."""

    def __init__(self, drafter: DrafterEngine, target: ReplayTarget, block_size: int) -> None:
        self.drafter, self.target, self.block_size = drafter, target, block_size
        self.prefill, self.join, self.leave, self.reset = drafter.prefill, drafter.join, drafter.leave, drafter.reset

    @property
    def mask_id(self) -> int:
        return self.drafter.mask_id

    @property
    def feature_width(self) -> int:
        return self.drafter.feature_width

    def forward(
        self, features: Floats, feature_lengths: Ints, block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        candidates, confidences = self.drafter.forward(features, feature_lengths, block_ids, positions, mask)
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
