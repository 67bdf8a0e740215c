"""Models over a graph with dense KV caches: a call pads its sequences to one size and reads their caches whole."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from engines.engine import Array, Bools, Features, GraphInfo, HostPass, Ints
from engines.kv_cache import Buffer, KVCache, capacity_for, gather

# Query tokens of a call are padded up to one of these, so that a runtime meets few shapes and has its kernels ready.
SIZES = (1, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128)
LONGEST = 512  # rows of a call at most: of pieces of prompts, of features to catch up with


class DenseEngine(ABC):
    """A graph, and the caches of its sequences.

    Those that run together lie in one cache, in the order of the call; a sequence's place is its cache and its row there.

    Args:
        slots: sequences open at once, at most.

    Attributes:
        cache: the class of its caches. runtime: what runs it, for people to read.
    """

    cache: type[KVCache] = KVCache
    runtime: str

    def __init__(self, info: GraphInfo, slots: int = 1024) -> None:
        self.info, self.slots = info, slots
        self._places: dict[int, tuple[KVCache, int]] = {}
        self._opened = 0

    @abstractmethod
    def allocate(self, sequences: int, capacity: int) -> list[Buffer]:
        """The buffers of a cache (``KVCache``)."""

    @abstractmethod
    def call(self, cache: KVCache, inputs: dict[str, Array]) -> tuple[dict[str, Array], list[Array]]:
        """Run the graph over the sequences of a cache.

        Args:
            inputs: every binding but the caches and ``past_lengths``.

        Returns:
            The outputs, and the new K/V rows, for each buffer of the cache; the next call overwrites both.
        """

    def send(self, array: NDArray) -> Array:
        """The host's array in the memory that outputs lie in."""
        return array

    def read(self, array: Array) -> NDArray:
        """An array of that memory in the host's."""
        return array

    def zeros(self, *shape: int) -> Array:
        """f32, in that memory."""
        return np.zeros(shape, np.float32)

    def verified(self, logits: Array) -> Any:
        """A target's logits as a pass (``decoding/engines.py``)."""
        return HostPass(logits)

    def room(self, rows: int) -> bool:
        return len(self._places) < self.slots

    def open(self, tokens: list[int], rows: int) -> int:
        self._opened += 1
        self._places[self._opened] = (self.cache(1, capacity_for(0), self.allocate), 0)
        return self._opened

    def length(self, sequence: int) -> int:
        cache, row = self._places[sequence]
        return int(cache.lengths[row])

    def close(self, sequence: int) -> None:
        del self._places[sequence]

    def reset(self) -> None:
        self._places.clear()

    def in_use(self, cache: KVCache) -> bool:
        """Whether a sequence lies in a cache."""
        return any(cache is own for own, _ in self._places.values())

    def run(self, sequences: Sequence[int], inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the graph over some of the sequences."""
        outputs, new = self.call(self._arranged(sequences), inputs)
        self._last = list(sequences), new
        return outputs

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Write the given rows of the last run's new K/V behind the cache of each of its sequences."""
        sequences, new = self._last
        cache, _ = self._places[sequences[0]]
        cache = cache.fitting(max(int(n) + len(r) for n, r in zip(cache.lengths, rows, strict=True)))
        cache.append(new, rows)
        self._put(sequences, cache)

    def _arranged(self, sequences: Sequence[int]) -> KVCache:
        """A cache with exactly these sequences, in this order: one that has them, one in which the others' rows are free, or
        a new one."""
        places = [self._places[sequence] for sequence in sequences]
        cache = next((cache for cache, _ in places if len(cache.lengths) == len(sequences)), None)
        if cache is None:
            cache = gather(places)
        else:
            newcomers = [row for row, place in enumerate(places) if place != (cache, row)]
            taken = {row for own, row in self._places.values() if own is cache}
            if taken.intersection(newcomers):
                cache = gather(places)
            elif newcomers:
                cache = cache.fitting(max(self.length(sequences[row]) for row in newcomers))
                for row in newcomers:
                    cache.replace(row, *places[row])
        self._put(sequences, cache)
        return cache

    def _put(self, sequences: Sequence[int], cache: KVCache) -> None:
        self._places.update((sequence, (cache, row)) for row, sequence in enumerate(sequences))


def padded(n: int) -> int:
    """The size that a call of n query tokens is padded to."""
    return next((size for size in SIZES if size >= n), -(-n // SIZES[-1]) * SIZES[-1])


def pad(array: Array, *sizes: int) -> Array:
    """Zero-pad the axes behind the first to ``sizes``."""
    if array.shape[1:] == sizes:
        return array
    xp = array_namespace(array)
    out = xp.zeros((array.shape[0], *sizes), dtype=array.dtype, device=device(array))
    out[tuple(slice(had) for had in array.shape)] = array
    return out


class Sequences:
    """What a model over an engine hands through: its sequences, and its memory."""

    def __init__(self, engine: DenseEngine) -> None:
        self.engine, self.runtime = engine, engine.runtime
        self.room, self.length = engine.room, engine.length
        self.send, self.read = engine.send, engine.read

    def open(self, tokens: list[int], rows: int) -> int:
        return self.engine.open(tokens, rows)

    def close(self, sequence: int) -> None:
        self.engine.close(sequence)

    def reset(self) -> None:
        self.engine.reset()


class Target(Sequences):
    """The target over an engine. Method contracts: ``decoding/engines.py``."""

    ragged = False

    def __init__(self, engine: DenseEngine) -> None:
        super().__init__(engine)
        self._features: dict[int, Features] = {}  # of each sequence: as many rows as were reserved

    @property
    def used(self) -> float:
        return len(self._features) / self.engine.slots

    def open(self, tokens: list[int], rows: int, fresh: bool = False) -> int:
        sequence = super().open(tokens, rows)
        self._features[sequence] = self.engine.zeros(rows, self.engine.info.feature_width)
        return sequence

    def close(self, sequence: int) -> None:
        super().close(sequence)
        del self._features[sequence]

    def reset(self) -> None:
        super().reset()
        self._features.clear()

    def forward(
        self,
        sequences: Sequence[int],
        token_ids: Array,
        positions: Array,
        mask: Array,
        counts: Sequence[int],
        silent: int = 0,
    ) -> Any:
        """Rows beyond ``counts`` and those of silent sequences are computed like any other: they fill the batch."""
        n = padded(token_ids.shape[1])
        inputs = {"token_ids": pad(token_ids, n), "positions": pad(positions, n), "mask": pad(mask, n, n)}
        outputs = self.engine.run(sequences, inputs)
        self._last = list(sequences), outputs["features"]
        return self.engine.verified(outputs["logits"])

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        sequences, made = self._last
        for b, (sequence, chosen) in enumerate(zip(sequences, rows, strict=True)):
            if chosen:
                start, index = self.length(sequence), self.send(np.array(chosen, np.int64))
                taken = array_namespace(made).take(made[b], index, axis=0)
                self._features[sequence][start : start + len(chosen)] = taken
        self.engine.keep(rows)

    def features(self, sequence: int, start: int, stop: int) -> Features:
        return self._features[sequence][start:stop]


class Drafter(Sequences):
    """A drafter over an engine. Method contracts: ``decoding/engines.py``."""

    @property
    def mask_id(self) -> int:
        return self.engine.info.mask_id

    def forward(
        self, sequences: Sequence[int], features: Sequence[Features], block_ids: Array, positions: Ints, mask: Bools
    ) -> tuple[Array, Array]:
        batch, n = block_ids.shape
        if not n:  # the graph demands a block; what it makes of it is dropped
            block_ids, positions = np.full((batch, 1), self.mask_id, np.int64), np.zeros((batch, 1), np.int64)
            mask = np.ones((batch, 1, 1), bool)
        fresh = [len(own) for own in features]
        outputs = self.engine.run(sequences, self._inputs(sequences, features, fresh, block_ids, positions, mask))
        self.engine.keep([range(count) for count in fresh])
        return outputs["tokens"][:, :n], outputs["confidences"][:, :n]

    def _inputs(
        self,
        sequences: Sequence[int],
        features: Sequence[Features],
        fresh: list[int],
        block_ids: Array,
        positions: Ints,
        mask: Bools,
    ) -> dict[str, Array]:
        batch, n, m = len(features), padded(block_ids.shape[1]), padded(max(fresh))
        stacked = self.engine.zeros(batch, m, self.engine.info.feature_width)
        for b, own in enumerate(features):
            stacked[b, : len(own)] = own
        places = np.arange(m)
        starts = np.array([self.length(sequence) for sequence in sequences])[:, None]
        valid = np.broadcast_to((places < np.array(fresh)[:, None])[:, None], (batch, n, m))
        return {
            "features": stacked,
            "block_ids": pad(block_ids, n),
            "positions": np.concatenate([starts + places, pad(positions, n)], axis=1),
            "mask": np.concatenate([valid, pad(mask, n, n)], axis=2),
        }
