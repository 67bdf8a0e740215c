"""The target's next token from its logits: greedy, or drawn at a temperature within top-k and top-p."""

from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace
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

    The uniform number alone decides the draw, so a request with one seed gets the same answer in every decoding mode and
    batch, as far as rounding allows: it gives every token an exponential number of its own, and the token of the largest
    probability / number is drawn. The last bit of a logit decides only where two tokens tie within it; in a draw from the
    cumulative distribution it would move all tokens behind.

    Args:
        logits: ``[V]``. uniform: in [0, 1); unused when greedy.
    """
    if greedy(sampling):
        return int(logits.argmax())
    tokens, probabilities = distribution(logits, sampling)
    return int(tokens[(probabilities / exponentials(np.float64(uniform), tokens)).argmax()])


def exponentials(uniform: Any, tokens: Any) -> Any:
    """A number for each token, exponentially distributed, that follows from the token and a uniform number alone.

    It is the counter-based generator SplitMix64 (Steele, Lea and Flood, 2014), in integers that wrap on every device.

    Args:
        uniform: f64 in [0, 1), of any shape that broadcasts with ``tokens``, which are int64; NumPy's or PyTorch's.
    """
    xp = array_namespace(tokens)
    with np.errstate(over="ignore"):
        stream = _mix(xp.astype(xp.asarray(uniform * 2.0**53), xp.int64))
        bits = _mix(stream + (tokens + 1) * GOLDEN)
    return -xp.log((xp.astype((bits >> 11) & (2**53 - 1), xp.float64) + 0.5) * 2.0**-53)


def _signed(number: int) -> int:
    return number - 2**64


GOLDEN, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Any) -> Any:
    """Spread the bits of int64 numbers; shifts bring zeros in, as of unsigned ones."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


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
