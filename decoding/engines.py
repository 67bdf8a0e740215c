"""What decoding asks of the engines: it runs on whatever has these methods, and knows no runtime.

An engine holds the running sequences in an order, and beside them one whose prompt is being taken in.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decoding.sampling import Sampling

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Features = Any  # [m, F] rows of the target's features, in the runtime's own memory: decoding hands them on unread


class Sequences(Protocol):
    def join(self, place: int | None) -> None:
        """Make the sequence whose prompt was taken in the last of the running ones, or put it in the place of one."""

    def leave(self, sequence: int) -> None:
        """Drop a running sequence; those behind it move up."""

    def reset(self) -> None:
        """Drop all sequences."""


class Pass(Protocol):
    """What a pass of the target says of each of its ``[B, N]`` tokens, until the next pass."""

    def choose(self, sequence: int, node: int, sampling: Sampling, uniform: float) -> int:
        """The target's token behind a node: the likeliest one, or the one that a uniform number in [0, 1) draws."""

    def features(self, sequence: int, nodes: Sequence[int]) -> Features:
        """Those of some nodes of a sequence, ``[len(nodes), F]``; they outlast the pass."""


class TargetEngine(Sequences, Protocol):
    def prefill(self, token_ids: Ints, positions: Ints, mask: Bools) -> Features:
        """Take ``[1, N]`` prompt tokens into the cache of the joining sequence. Returns their features ``[N, F]``,
        which the next call overwrites."""

    def forward(self, token_ids: Ints, positions: Ints, mask: Bools) -> Pass:
        """Run over ``[B, N]`` tokens of the running sequences under ``[B, N, N]`` masks."""

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Write the last forward's K/V of the given query rows of each sequence into its cache, in order."""


class DrafterEngine(Sequences, Protocol):
    def prefill(self, features: Features) -> None:
        """Take prompt features ``[M, F]`` into the cache of the joining sequence."""

    def forward(
        self, features: Sequence[Features | None], block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        """Take the features of newly committed tokens into the cache, then run over blocks.

        Args:
            features: of each running sequence, ``[m, F]``, or None if there are none.
            block_ids: ``[B, N]``. positions: ``[B, N]``.
            mask: ``[B, N, N]``, which block tokens see each other.

        Returns:
            candidates ``[B, N, A]``, the A likeliest tokens of each place, best first, and their probabilities; both are
            overwritten by the next call.
        """

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked place."""
