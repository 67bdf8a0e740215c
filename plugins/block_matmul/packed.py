"""The order in which ``kernel.hpp`` takes a matrix in blocks.

L columns at a time, filled up with zeros to a multiple of 32; L, the lanes, are the floats that a register holds (8 or 16). Of
these one block of K after the other: codes, L scales and, with 4 bits, L minima.

* 4 bits (codes 0 to 15, blocks of 32): four times 4·L bytes. Byte 4·c + j of the g-th holds rows 4·g + j (low half) and
  16 + 4·g + j (high half) of column c.
* 8 bits (codes -128 to 127, blocks of 16 or 32): with 8 lanes 16 bytes for each two rows, byte 2·c + j row j of these;
  with 16 lanes 64 bytes for each four rows, byte 4·c + j row j of these, and 128 more than the code (``vectors.hpp``).
* 32 bits: floats, row by row; they have no scales. Blocks are of 32.

Scales and minima are f16 where that is exact for all of them, as it is for what a GGUF file holds as f16, else f32.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH = 32


@dataclass(frozen=True)
class Packed:
    """A matrix ``[K, N]``.

    Attributes:
        data: bytes, in the order above. columns: N. bits, block: of codes or floats. half: scales and minima are f16.
    """

    data: NDArray[np.uint8]
    columns: int
    bits: int
    block: int
    half: bool


def pack(
    codes: NDArray[np.int8], scales: NDArray[np.float32], minima: NDArray[np.float32] | None = None, *, bits: int, lanes: int
) -> Packed | None:
    """Pack a matrix.

    Args:
        codes: ``[K, N]``, from -8 to 7 with 4 bits. scales, minima: ``[K / block, N]``. lanes: 8 or 16.

    Returns:
        None where the kernel has no form for it: other blocks, or minima with 8 bits.
    """
    depth, columns = codes.shape
    block = depth // len(scales)
    if depth % WIDTH or (block != WIDTH if bits == 4 else block not in (16, WIDTH) or minima is not None):
        return None
    numbers = [scales]
    if bits == 4:
        codes = codes + np.int8(8)
        numbers.append((0 if minima is None else minima) - 8 * scales)
    half = all(np.array_equal(each.astype(np.float16).astype(np.float32), each) for each in numbers)
    behind = [_lanes(each.astype(np.float16 if half else np.float32), len(scales), 1, lanes) for each in numbers]
    units = _lanes(codes.view(np.uint8), len(scales), block, lanes)  # [N / lanes, K / block, block, lanes]
    if bits == 4:
        low, high = units[:, :, :16], units[:, :, 16:]
        both = (low | high << 4).reshape(*units.shape[:2], 4, 4, lanes)  # g, j, c
        body = both.swapaxes(3, 4)
    else:
        beside = lanes // 4
        body = units.reshape(*units.shape[:2], block // beside, beside, lanes).swapaxes(3, 4) ^ (0x80 if lanes == 16 else 0)
    flat = [np.ascontiguousarray(each).reshape(*units.shape[:2], -1).view(np.uint8) for each in (body, *behind)]
    return Packed(np.concatenate(flat, axis=-1).reshape(-1), columns, bits, block, half)


def pack_floats(weights: NDArray[np.float32], *, lanes: int) -> Packed | None:
    """Pack a matrix ``[K, N]``; None where K is no multiple of 32."""
    depth, columns = weights.shape
    if depth % WIDTH:
        return None
    blocks = np.ascontiguousarray(_lanes(weights, depth // WIDTH, WIDTH, lanes))
    return Packed(blocks.reshape(-1).view(np.uint8), columns, 32, WIDTH, False)


def _lanes(matrix: NDArray, blocks: int, rows: int, lanes: int) -> NDArray:
    """``[blocks · rows, N]`` to ``[N / lanes, blocks, rows, lanes]``, N filled up."""
    filled = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % WIDTH)))
    return filled.reshape(blocks, rows, -1, lanes).transpose(2, 0, 1, 3)
