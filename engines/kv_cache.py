"""The KV cache of a graph: what its ``past_*`` bindings read, without a copy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALLEST = 256  # rows


@dataclass(frozen=True)
class Buffer:
    """Memory that the runtime reads and writes as it lies.

    Attributes:
        array: our view of it: NumPy's, or PyTorch's of what lies on a device. value: the runtime's own.
    """

    array: Any
    value: Any


Allocate = Callable[[int, int], list[Buffer]]  # for so many sequences of so many rows, filled with zeros


class KVCache:
    """Keys and values of B sequences: ``[B, Hkv, C, D]`` for each K and V of each layer.

    A cache is as large as what is in it: C is the smallest power of two (256 at least) that holds the longest sequence.
    When the number of sequences changes or one outgrows C, the rows in use are copied into a new cache.

    Attributes:
        buffers: K and V of layer 0, of layer 1, …: each in a buffer of its own, or all in one ``[2·layers, B, Hkv, C, D]``.
            Their rows beyond ``lengths`` are finite.
        lengths: ``[B]`` int64, rows in use.
    """

    def __init__(self, sequences: int, capacity: int, allocate: Allocate) -> None:
        self.allocate = allocate
        self.capacity = capacity
        self.lengths = np.zeros(sequences, dtype=np.int64)
        self.buffers = allocate(sequences, capacity)

    def append(self, new: Sequence[Any], rows: Sequence[Sequence[int]]) -> None:
        """Write rows of ``new``, shaped as the buffers but T instead of C, behind each sequence's. There must be room."""
        self.write(new, rows)
        self.lengths += [len(chosen) for chosen in rows]

    def write(self, new: Sequence[Any], rows: Sequence[Sequence[int]]) -> None:
        for sequence, chosen in enumerate(rows):
            if not chosen:
                continue
            start = int(self.lengths[sequence])
            run = slice(chosen[0], chosen[-1] + 1) if list(chosen) == list(range(chosen[0], chosen[-1] + 1)) else list(chosen)
            for buffer, source in zip(self.buffers, new, strict=True):
                buffer.array[..., sequence, :, start : start + len(chosen), :] = source[..., sequence, :, :, :][..., run, :]

    def replace(self, sequence: int, cache: "KVCache", source: int) -> None:
        """Take over the rows of a sequence of another cache. There must be room."""
        length = int(cache.lengths[source])
        for mine, theirs in zip(self.buffers, cache.buffers, strict=True):
            mine.array[..., sequence, :, :length, :] = theirs.array[..., source, :, :length, :]
        self.lengths[sequence] = length

    def fitting(self, rows: int) -> "KVCache":
        """This cache, or a larger copy of it if ``rows`` do not fit."""
        return self if rows <= self.capacity else gather([(self, b) for b in range(len(self.lengths))], rows)


def gather(sources: Sequence[tuple[KVCache, int]], rows: int = 0) -> KVCache:
    """Make a cache of the given sequences of other caches, in order, with room for ``rows`` of each at least."""
    model = sources[0][0]
    longest = max(int(cache.lengths[b]) for cache, b in sources)
    made = type(model)(len(sources), capacity_for(max(rows, longest)), model.allocate)
    for b, (cache, source) in enumerate(sources):
        made.replace(b, cache, source)
    return made


def capacity_for(rows: int) -> int:
    """C of a cache that holds ``rows``."""
    return max(SMALLEST, 1 << (rows - 1).bit_length() if rows else 0)
