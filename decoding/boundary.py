"""Where the target will probably reject the first draft, and the K places worth a branch (docs/method.md §2)."""

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from decoding.engines import Array


def rejection_probabilities(confidences: Array) -> Array:
    """r(i) = (c_1 ⋯ c_i)·(1 - c_{i+1}): the chance that exactly the first i draft tokens are accepted.

    Args:
        confidences: ``[..., γ-1]``, c_k of draft token k = 1 … γ-1, each in [0, 1].

    Returns:
        ``[..., γ-1]`` f64, i = 0 … γ-2. What is missing to 1 is the chance that the whole block is accepted.
    """
    xp = array_namespace(confidences)
    c = xp.astype(confidences, xp.float64)
    reached = xp.concat([xp.ones_like(c[..., :1]), xp.cumulative_prod(c, axis=-1)[..., :-1]], axis=-1)
    return reached * (1.0 - c)


def likeliest(confidences: Array, branches: int) -> Array:
    """The K boundaries with the largest r(i): how many draft tokens each branch keeps.

    Args:
        confidences: ``[..., γ-1]``. branches: K; no more than γ-1 are chosen.

    Returns:
        ``[..., min(K, γ-1)]`` int64, ascending.
    """
    xp = array_namespace(confidences)
    ranked = xp.argsort(rejection_probabilities(confidences), axis=-1, descending=True, stable=True)
    return xp.sort(ranked[..., :branches], axis=-1)


def anywhere(places: int, branches: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Any K of ``places`` = γ-1 boundaries with equal chance, ``[min(K, γ-1)]``, ascending."""
    return np.sort(rng.choice(places, size=min(branches, places), replace=False))
