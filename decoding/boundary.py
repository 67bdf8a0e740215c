"""Where the target will probably reject the first draft, and the K places worth a branch (docs/method.md §2)."""

import numpy as np
from numpy.typing import NDArray

from decoding.modes import Selection


def rejection_probabilities(confidences: NDArray[np.float32]) -> NDArray[np.float64]:
    """r(i) = (c_1 ⋯ c_i)·(1 - c_{i+1}): the chance that exactly the first i draft tokens are accepted.

    Args:
        confidences: ``[γ-1]``, c_k of draft token k = 1 … γ-1, each in [0, 1].

    Returns:
        ``[γ-1]`` f64, i = 0 … γ-2. What is missing to 1 is the chance that the whole block is accepted.
    """
    c = np.asarray(confidences, dtype=np.float64)
    reached = np.concatenate([[1.0], np.cumprod(c[:-1])])
    return reached * (1.0 - c)


def select(
    confidences: NDArray[np.float32], branches: int, selection: Selection, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Choose the boundaries at which to branch: how many draft tokens each branch keeps.

    Args:
        confidences: ``[γ-1]``. branches: K; no more than γ-1 are chosen.
        selection: ``confidence`` takes the K largest r(i), ``uniform`` any K with equal chance, drawn from ``rng``.

    Returns:
        ``[min(K, γ-1)]`` int64, ascending.
    """
    places = len(confidences)
    count = min(branches, places)
    if selection == "uniform":
        return np.sort(rng.choice(places, size=count, replace=False))
    ranked = np.argsort(-rejection_probabilities(confidences), kind="stable")
    return np.sort(ranked[:count])
