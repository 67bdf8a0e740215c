"""A compiled graph with the KV caches of its sequences, whatever runs it; the target and the drafters on top of that."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from engines import sampling
from engines.kv_cache import Buffer, KVCache, capacity_for, gather

# Query tokens of a call are padded up to one of these, so that a runtime meets few shapes and has its kernels ready.
SIZES = (1, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128)

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Array = Any  # NumPy's, or PyTorch's on a device
Features = Array  # [m, F]


class EngineError(RuntimeError):
    """An engine cannot be loaded or run here; the message says what is missing."""


@dataclass(frozen=True)
class GraphInfo:
    """What the manifest says of a graph.

    Attributes:
        layers, kv_heads, head_dim: of its KV cache. heads: of its queries.
        feature_width: F. vocabulary: V. mask_id: of a drafter, -1 for a target.
    """

    layers: int
    kv_heads: int
    head_dim: int
    feature_width: int
    vocabulary: int
    mask_id: int = -1
    heads: int = 0

    @property
    def cache_bindings(self) -> list[str]:
        """``k_0, v_0, k_1, …``: behind ``past_`` the caches that a call reads, behind ``new_`` the rows that it makes."""
        return [f"{kind}_{layer}" for layer in range(self.layers) for kind in "kv"]


class HostPass:
    """A pass of the target whose logits ``[B, N, V]`` and features ``[B, N, F]`` lie in the host's memory."""

    def __init__(self, logits: Floats, features: Floats) -> None:
        self._logits, self._features = logits, features

    def choose(self, nodes: Ints, how: Sequence[sampling.Sampling], uniforms: NDArray[np.float64]) -> Ints:
        chosen = np.zeros_like(nodes)
        for b, node in enumerate(nodes):
            if node >= 0:
                chosen[b] = sampling.choose(self._logits[b, node], how[b], uniforms[b])
        return chosen

    def features(self, sequence: int, nodes: Sequence[int]) -> Floats:
        return self._features[sequence, nodes]


class Engine(ABC):
    """A graph, the cache of the running sequences, and that of the one whose prompt is being taken in.

    Attributes:
        cache: the class of its caches. runtime: what runs it, for people to read.
    """

    cache: type[KVCache] = KVCache
    runtime: str

    def __init__(self, info: GraphInfo) -> None:
        self.info = info
        self.running: KVCache | None = None
        self.joining = self._empty()

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

    def stack(self, features: Sequence[Features | None], rows: int) -> Array:
        """Features of each sequence, ``[m, F]`` or None, zero-padded to ``[B, rows, F]``."""
        stacked = np.zeros((len(features), rows, self.info.feature_width), np.float32)
        for b, own in enumerate(features):
            if own is not None:
                stacked[b, : len(own)] = own
        return stacked

    def verified(self, outputs: dict[str, Array]) -> Any:
        """A target's outputs as a pass (``decoding/engines.py``)."""
        return HostPass(outputs["logits"], outputs["features"])

    def prefill(self, inputs: dict[str, Array], rows: int) -> dict[str, Array]:
        """Run over the joining sequence and keep the first ``rows`` rows."""
        self.joining = self.joining.fitting(int(self.joining.lengths[0]) + rows)
        outputs, new = self.call(self.joining, inputs)
        self.joining.append(new, [range(rows)])
        return outputs

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run over the running sequences."""
        assert self.running is not None
        outputs, self._new = self.call(self.running, inputs)
        return outputs

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Write the given rows of the last run's new K/V behind the cache of each running sequence."""
        assert self.running is not None
        self.running = self.running.fitting(max(int(n) + len(r) for n, r in zip(self.running.lengths, rows, strict=True)))
        self.running.append(self._new, rows)

    def join(self, place: int | None) -> None:
        """Make the joining sequence the last of the running ones, or put it in the place of one of them."""
        if self.running is None:
            self.running = self.joining
        elif place is not None:
            self.running = self.running.fitting(int(self.joining.lengths[0]))
            self.running.replace(place, self.joining, 0)
        else:
            self.running = gather([*((self.running, b) for b in range(len(self.running.lengths))), (self.joining, 0)])
        self.joining = self._empty()

    def leave(self, sequence: int) -> None:
        """Drop one of the running sequences; those behind it move up."""
        assert self.running is not None
        rest = [(self.running, b) for b in range(len(self.running.lengths)) if b != sequence]
        self.running = gather(rest) if rest else None

    def reset(self) -> None:
        """Drop all sequences."""
        self.running, self.joining = None, self._empty()

    def _empty(self) -> KVCache:
        return self.cache(1, capacity_for(0), self.allocate)


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
    """What a model over an engine hands through: which sequences there are, and its memory."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.join, self.leave, self.reset = engine.join, engine.leave, engine.reset
        self.send, self.read = engine.send, engine.read


class Target(Sequences):
    """The target over an engine. Method contracts: ``decoding/engines.py``."""

    def prefill(self, token_ids: Ints, positions: Ints, mask: Bools) -> Features:
        n = token_ids.shape[1]
        return self.engine.prefill(self._inputs(token_ids, positions, mask), n)["features"][0, :n]

    def forward(self, token_ids: Array, positions: Array, mask: Array) -> Any:
        return self.engine.verified(self.engine.run(self._inputs(token_ids, positions, mask)))

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        self.engine.keep(rows)

    def _inputs(self, token_ids: Array, positions: Array, mask: Array) -> dict[str, Array]:
        n = padded(token_ids.shape[1])
        return {"token_ids": pad(token_ids, n), "positions": pad(positions, n), "mask": pad(mask, n, n)}


class Drafter(Sequences):
    """A drafter over an engine. Method contracts: ``decoding/engines.py``."""

    @property
    def mask_id(self) -> int:
        return self.engine.info.mask_id

    def prefill(self, features: Features) -> None:
        token = np.full((1, 1), self.mask_id, dtype=np.int64)  # the graph demands a block; what it makes of it is dropped
        inputs = self._inputs([features], [len(features)], token, np.zeros((1, 1), np.int64), np.ones((1, 1, 1), bool))
        self.engine.prefill(inputs, len(features))

    def forward(
        self, features: Sequence[Features | None], block_ids: Array, positions: Ints, mask: Bools
    ) -> tuple[Array, Array]:
        n = block_ids.shape[1]
        lengths = [0 if own is None else len(own) for own in features]
        out = self.engine.run(self._inputs(features, lengths, block_ids, positions, mask))
        self.engine.keep([range(length) for length in lengths])
        return out["tokens"][:, :n], out["confidences"][:, :n]

    def _inputs(
        self, features: Sequence[Features | None], lengths: list[int], block_ids: Array, positions: Ints, mask: Bools
    ) -> dict[str, Array]:
        n, m = padded(block_ids.shape[1]), padded(max(lengths))
        valid = np.arange(m) < np.array(lengths)[:, None]
        return {
            "features": self.engine.stack(features, m),
            "block_ids": pad(block_ids, n),
            "positions": pad(positions, n),
            "mask": np.concatenate([np.broadcast_to(valid[:, None], (len(valid), n, m)), pad(mask, n, n)], axis=2),
        }
