"""The KV cache of a graph: what its ``past_*`` bindings read, without a copy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST = 256  # rows


@dataclass(frozen=True)
class Buffer:
    """Memory that the runtime reads and writes as it lies.

    Attributes:
        array: the host's view of it. value: the runtime's own.
    """

    array: NDArray
    value: Any


Allocate = Callable[[tuple[int, ...], type[np.generic]], Buffer]


class KVCache:
    """Keys and values of B sequences: a ``[B, Hkv, C, D]`` buffer for each K and V of each layer.

    A cache is as large as what is in it: C is the smallest power of two (256 at least) that holds the longest sequence.
    When the number of sequences changes or one outgrows C, the rows in use are copied into a new cache.

    Attributes:
        buffers: K and V of layer 0, of layer 1, … Their rows beyond ``lengths`` are finite.
        lengths: ``[B]`` int64, rows in use.
    """

    def __init__(self, count: int, kv_heads: int, head_dim: int, sequences: int, capacity: int, allocate: Allocate) -> None:
        self.shape = (count, kv_heads, head_dim)
        self.allocate = allocate
        self.capacity = capacity
        self.lengths = np.zeros(sequences, dtype=np.int64)
        self.buffers = [allocate((sequences, kv_heads, capacity, head_dim), np.float32) for _ in range(count)]
        for buffer in self.buffers:
            buffer.array.fill(0)

    def append(self, sequence: int, new: Iterable[NDArray], rows: Sequence[int]) -> None:
        """Write rows of ``new``, a ``[B, Hkv, T, D]`` for each buffer, behind those of a sequence. There must be room."""
        start = int(self.lengths[sequence])
        stop = start + len(rows)
        run = slice(rows[0], rows[-1] + 1) if list(rows) == list(range(rows[0], rows[-1] + 1)) else rows
        for buffer, source in zip(self.buffers, new, strict=True):
            buffer.array[sequence, :, start:stop] = source[sequence][:, run]
        self.lengths[sequence] = stop

    def replace(self, sequence: int, cache: "KVCache", source: int) -> None:
        """Take over the rows of a sequence of another cache. There must be room."""
        length = int(cache.lengths[source])
        for mine, theirs in zip(self.buffers, cache.buffers, strict=True):
            mine.array[sequence, :, :length] = theirs.array[source, :, :length]
        self.lengths[sequence] = length

    def fitting(self, rows: int) -> "KVCache":
        """This cache, or a larger copy of it if ``rows`` do not fit."""
        return self if rows <= self.capacity else gather([(self, b) for b in range(len(self.lengths))], rows)


def gather(sources: Sequence[tuple[KVCache, int]], rows: int = 0) -> KVCache:
    """Make a cache of the given sequences of other caches, in order, with room for ``rows`` of each at least."""
    model = sources[0][0]
    longest = max(int(cache.lengths[b]) for cache, b in sources)
    made = KVCache(*model.shape, len(sources), capacity_for(max(rows, longest)), model.allocate)
    for b, (cache, source) in enumerate(sources):
        made.replace(b, cache, source)
    return made


def capacity_for(rows: int) -> int:
    """C of a cache that holds ``rows``."""
    return max(SMALLEST, 1 << (rows - 1).bit_length() if rows else 0)
