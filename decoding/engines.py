"""What decoding asks of the engines: it runs on whatever has these methods, and knows no runtime.

An engine holds the running sequences in an order, and beside them one whose prompt is being taken in. What it makes stays in
the runtime's own memory, which may be a device's. Decoding works on it there, by the Python array API standard, and waits for
a device only in ``read``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decoding.sampling import Sampling

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Array = Any  # NumPy's, or PyTorch's on a device; both have the array API standard's operations
Features = Array  # [m, F] rows of the target's features: decoding hands them on unread


class Sequences(Protocol):
    def join(self, place: int | None) -> None:
        """Make the sequence whose prompt was taken in the last of the running ones, or put it in the place of one."""

    def leave(self, sequence: int) -> None:
        """Drop a running sequence; those behind it move up."""

    def reset(self) -> None:
        """Drop all sequences."""

    def send(self, array: NDArray) -> Array:
        """The host's array in the runtime's memory; the host does not wait for it."""

    def read(self, array: Array) -> NDArray:
        """The runtime's array in the host's memory, waited for."""


class Pass(Protocol):
    """What a pass of the target says of each of its ``[B, N]`` tokens, until the next pass."""

    def choose(self, nodes: Array, sampling: Sequence[Sampling], uniforms: Array) -> Array:
        """The target's token behind a node of each sequence: the likeliest, or the one that a uniform number draws.

        Args:
            nodes: ``[B]`` int64; below 0 where there is none. uniforms: ``[B]`` f64 in [0, 1).

        Returns:
            ``[B]`` int64, void where there is no node.
        """

    def features(self, sequence: int, nodes: Sequence[int]) -> Features:
        """Those of some nodes of a sequence, ``[len(nodes), F]``; they outlast the pass."""


class TargetEngine(Sequences, Protocol):
    def prefill(self, token_ids: Ints, positions: Ints, mask: Bools) -> Features:
        """Take ``[1, N]`` prompt tokens into the cache of the joining sequence. Returns their features ``[N, F]``,
        which the next call overwrites."""

    def forward(self, token_ids: Array, positions: Array, mask: Array) -> Pass:
        """Run over ``[B, N]`` tokens of the running sequences under ``[B, N, N]`` masks."""

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Write the last forward's K/V of the given query rows of each sequence into its cache, in order."""


class DrafterEngine(Sequences, Protocol):
    def prefill(self, features: Features) -> None:
        """Take prompt features ``[M, F]`` into the cache of the joining sequence."""

    def forward(
        self, features: Sequence[Features | None], block_ids: Array, positions: Ints, mask: Bools
    ) -> tuple[Array, Array]:
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
