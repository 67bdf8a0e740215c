"""What K/V are kept in, and where a token's row lies in a block of the pool (``plugins/cascade_attention/paged.hpp``).

``f32``; ``f16`` and ``pairs`` beside weights that are rounded far more than that, where attention is ours; ``bf16`` in
OpenVINO's own. ``pairs`` are bf16 as AVX512_BF16 multiplies it, two numbers at once: keys by two of their dimensions,
``[D/2, BLOCK, 2]``, values by two tokens, ``[BLOCK/2, D, 2]``, the second one first.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kept = Literal["f32", "f16", "bf16", "pairs"]
NUMBERS: dict[Kept, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "pairs": np.uint16}


def move(
    cache: NDArray, kept: Kept, block: Sequence[int], place: Sequence[int], to_block: Sequence[int], to_place: Sequence[int]
) -> None:
    """Copy rows from where they lie to where they belong; all are read before any is written.

    Args:
        cache: ``[2·layers, blocks, Hkv, BLOCK, D]``, K and V of layer 0, of layer 1, …
        block, place: ``[R]``, of each row, the place in its block. to_block, to_place: where it belongs.
    """
    if kept != "pairs":
        cache[:, to_block, :, to_place] = cache[:, block, :, place]
        return
    *_, size, dim = cache.shape
    keys = cache[0::2].reshape(*cache[0::2].shape[:3], dim // 2, size, 2)
    keys[:, to_block, :, :, to_place] = keys[:, block, :, :, place]
    values = cache[1::2].reshape(*cache[1::2].shape[:3], size // 2, dim, 2)
    pair, second = np.divmod(place, 2)
    to_pair, to_second = np.divmod(to_place, 2)
    values[:, to_block, :, to_pair, :, 1 - to_second] = values[:, block, :, pair, :, 1 - second]
