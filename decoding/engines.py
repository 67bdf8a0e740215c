"""What decoding asks of the engines: it runs on whatever has these methods, and knows no runtime.

An engine holds the running sequences in an order, and beside them one whose prompt is being taken in.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class Sequences(Protocol):
    def join(self, place: int | None) -> None:
        """Make the sequence whose prompt was taken in the last of the running ones, or put it in the place of one."""

    def leave(self, sequence: int) -> None:
        """Drop a running sequence; those behind it move up."""

    def reset(self) -> None:
        """Drop all sequences."""


class TargetEngine(Sequences, Protocol):
    def prefill(self, token_ids: Ints, positions: Ints, mask: Bools) -> Floats:
        """Take ``[1, N]`` prompt tokens into the cache of the joining sequence. Returns their features ``[1, N, F]``."""

    def forward(self, token_ids: Ints, positions: Ints, mask: Bools) -> tuple[Floats, Floats]:
        """Run over ``[B, N]`` tokens of the running sequences under ``[B, N, N]`` masks.

        Returns:
            logits ``[B, N, V]`` and features ``[B, N, F]``; both are overwritten by the next call.
        """

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Write the last forward's K/V of the given query rows of each sequence into its cache, in order."""


class DrafterEngine(Sequences, Protocol):
    def prefill(self, features: Floats) -> None:
        """Take prompt features ``[1, M, F]`` into the cache of the joining sequence."""

    def forward(
        self, features: Floats, feature_lengths: Ints, block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        """Take the features of newly committed tokens into the cache, then run over blocks.

        Args:
            features: ``[B, M, F]``, ``feature_lengths[b]`` rows of them valid, 0 to M.
            block_ids: ``[B, N]``. positions: ``[B, N]``.
            mask: ``[B, N, N]``, which block tokens see each other.

        Returns:
            candidates ``[B, N, A]``, the A likeliest tokens of each place, best first, and their probabilities; both are
            overwritten by the next call.
        """

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked place."""

    @property
    def feature_width(self) -> int:
        """F."""
