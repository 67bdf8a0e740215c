"""What the operator computes, in plain NumPy."""

import numpy as np
from numpy.typing import NDArray

GROUP = 32


def block_matmul(
    x: NDArray[np.float32], codes: NDArray[np.int8], scales: NDArray[np.float32], minima: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """Rows, rounded as the kernel rounds them, times the unfolded matrix, in f64. Shapes: the package's table."""
    size = len(codes) // len(scales)
    weights = codes * scales.astype(np.float64).repeat(size, axis=0)
    if minima is not None:
        weights += minima.repeat(size, axis=0)
    return rounded(x) @ weights


def rounded(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """``[.., K]`` to 8 bits in groups of 32, each scaled by its largest value; halves go to the even number."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    peak = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    codes = np.rint(groups * inverse)
    return (codes.astype(np.float64) * (peak / np.float32(127))).reshape(x.shape)
