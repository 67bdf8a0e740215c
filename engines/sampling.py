"""The target's next token from its logits: greedy, or drawn at a temperature within top-k and top-p."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Sampling(Protocol):
    """How a token is chosen; what each says: ``decoding/sampling.py``."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


def greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is chosen."""
    return sampling.temperature == 0.0 or sampling.top_k == 1


def choose(logits: NDArray[np.float32], sampling: Sampling, uniform: float) -> int:
    """Choose the next token.

    The uniform number alone decides the draw (inverse of the cumulative distribution), so a request with one seed gets
    the same answer in every decoding mode and batch, up to the rounding of the logits.

    Args:
        logits: ``[V]``. uniform: in [0, 1); unused when greedy.
    """
    if greedy(sampling):
        return int(logits.argmax())
    tokens, probabilities = distribution(logits, sampling)
    cumulative = np.cumsum(probabilities)
    return int(tokens[np.searchsorted(cumulative, uniform * cumulative[-1], side="right").clip(max=len(tokens) - 1)])


def log_probabilities(
    logits: NDArray[np.float32], tokens: NDArray[np.int64], top: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """What the target says of tokens, before any temperature or cut.

    Args:
        logits: ``[n, V]``. tokens: ``[n]``. top: how many of the likeliest tokens to name, T.

    Returns:
        Natural logarithms of the probabilities of ``tokens`` ``[n]``; the likeliest tokens ``[n, T]``, best first, and
        theirs ``[n, T]``.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max(axis=-1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    top = min(top, scaled.shape[-1])
    best = np.argpartition(-scaled, max(top - 1, 0), axis=-1)[:, :top]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scaled, best, -1), axis=-1, kind="stable"), -1)
    return scaled[np.arange(len(tokens)), tokens], best, np.take_along_axis(scaled, best, -1)


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The processed distribution: tokens, ascending, and their probabilities in f64. For a temperature above 0."""
    scaled = logits.astype(np.float64)
    scaled = (scaled - scaled.max()) / sampling.temperature
    tokens = np.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        tokens = np.sort(np.argpartition(scaled, -sampling.top_k)[-sampling.top_k :])
        scaled = scaled[tokens]
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        # All tokens below the threshold together weigh less than 1 - top_p: none of them can be needed to reach top_p.
        likely = probabilities >= (1.0 - sampling.top_p) / len(probabilities)
        tokens, probabilities = tokens[likely], probabilities[likely]
        order = np.argsort(-probabilities, kind="stable")
        needed = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1
        kept = np.sort(order[:needed])
        tokens, probabilities = tokens[kept], probabilities[kept]
        probabilities /= probabilities.sum()
    return tokens, probabilities
