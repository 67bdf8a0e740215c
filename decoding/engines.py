"""What decoding asks of the engines: it runs on whatever has these methods, and knows no runtime.

An engine holds sequences, each with a KV cache of its own. What it makes stays in the runtime's own memory, which may be a
device's. Decoding works on it there, by the Python array API standard, and waits for a device only in ``read``.
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
    def room(self, rows: int) -> bool:
        """Whether one more sequence can be opened that will hold up to ``rows`` tokens."""

    def open(self, tokens: list[int], rows: int) -> int:
        """Begin a sequence and reserve what ``rows`` tokens can need. Returns the number it goes by.

        Args:
            tokens: of the sequence, which its owner goes on appending to. An engine that still has the K/V of their
                beginning, computed for another sequence, starts with it: see ``length``.
        """

    def length(self, sequence: int) -> int:
        """Tokens of a sequence whose K/V are in its cache."""

    def close(self, sequence: int) -> None:
        """End a sequence and free what it held."""

    def reset(self) -> None:
        """End all sequences."""

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

    def log_probabilities(
        self, row: int, nodes: Sequence[int], tokens: Sequence[int], top: int
    ) -> tuple[NDArray[np.float64], Ints, NDArray[np.float64]]:
        """What the target says of ``[n]`` tokens, each behind its node of one sequence, before any temperature or cut.

        Args:
            row: the sequence's place in the pass. top: how many of the likeliest tokens to name, T.

        Returns:
            Natural logarithms of their probabilities ``[n]``, the likeliest tokens ``[n, T]``, best first, and theirs
            ``[n, T]``, in the host's memory.
        """


class TargetEngine(Sequences, Protocol):
    @property
    def ragged(self) -> bool:
        """Whether a pass costs what its rows cost, padding nothing: pieces of prompts then ride with the trees."""

    @property
    def used(self) -> float:
        """Part of the memory for K/V that sequences hold, 1 is all."""

    def open(self, tokens: list[int], rows: int, fresh: bool = False) -> int:
        """As of any engine; with ``fresh`` it starts with nothing, whatever is known of its tokens."""

    def forward(
        self,
        sequences: Sequence[int],
        token_ids: Array,
        positions: Array,
        mask: Array,
        counts: Sequence[int],
        silent: int = 0,
    ) -> Pass:
        """Run over ``[B, N]`` tokens of some sequences under ``[B, N, N]`` masks, in which no token sees a later one.

        Args:
            counts: how many tokens of each row of ``token_ids`` are there, its first ones; N each where only a device knows.
            silent: the last so many sequences are pieces of prompts, of which nothing will be chosen.
        """

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Take the given tokens of each sequence of the last forward into its cache, in order: K/V and features."""

    def features(self, sequence: int, start: int, stop: int) -> Features:
        """Those of the tokens in a sequence's cache from ``start`` up to ``stop``, ``[stop - start, F]``."""


class DrafterEngine(Sequences, Protocol):
    def forward(
        self, sequences: Sequence[int], features: Sequence[Features], block_ids: Array, positions: Ints, mask: Bools
    ) -> tuple[Array, Array]:
        """Take the features of committed tokens into the caches of some sequences, then run over blocks.

        Args:
            features: of each sequence, ``[m, F]``, those behind its ``length``; m may be 0, and differ.
            block_ids: ``[B, N]``; N may be 0. positions: ``[B, N]``.
            mask: ``[B, N, N]``, which block tokens see each other.

        Returns:
            candidates ``[B, N, A]``, the A likeliest tokens of each place, best first, and their probabilities; both are
            overwritten by the next call.
        """

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked place."""


class Costs(Protocol):
    """What a call takes on this machine at its usual pace, in seconds.

    ``pace``: how many times as long calls take at the moment.
    ``rows``: tokens of the call over all its sequences (a drafter's: of blocks, and features taken in); for the target an int64
    array of any shape.
    ``context``: tokens in the caches of its sequences, together.
    """

    pace: float

    def target(self, rows: Ints, sequences: int, context: int) -> NDArray[np.float64]: ...

    def first(self, rows: int, sequences: int, context: int) -> float: ...

    def second(self, rows: int, sequences: int, context: int) -> float: ...

    def observe(self, engine: str, rows: int, sequences: int, context: int, seconds: float) -> None:
        """Learn from a call that was made. engine: ``target``, ``first`` or ``second``."""
