"""What all engines share: what the manifest says of a graph, and a pass whose logits lie in the host's memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import sampling

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
    """A pass of the target whose logits ``[B, N, V]`` lie in the host's memory."""

    def __init__(self, logits: Floats) -> None:
        self._logits = logits

    def choose(self, nodes: Ints, how: Sequence[sampling.Sampling], uniforms: NDArray[np.float64]) -> Ints:
        chosen = np.zeros_like(nodes)
        for b, node in enumerate(nodes):
            if node >= 0:
                chosen[b] = sampling.choose(self._logits[b, node], how[b], uniforms[b])
        return chosen

    def log_probabilities(
        self, row: int, nodes: Sequence[int], tokens: Sequence[int], top: int
    ) -> tuple[NDArray[np.float64], Ints, NDArray[np.float64]]:
        return sampling.log_probabilities(self._logits[row, list(nodes)], np.array(tokens, dtype=np.int64), top)
