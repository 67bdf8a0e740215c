"""Accepted rows written behind what a KV cache on a device holds, in one launch for all layers; in Triton's language."""

# mypy: disable-error-code=no-untyped-def
# What stands under @triton.jit is not Python's to type.

import triton
import triton.language as tl
from torch import Tensor

TILE = 16  # rows that a program writes


@triton.jit(do_not_specialize=["B", "T", "C", "NEW", "ROWS", "COUNTS", "LENGTHS"])
def write(
    new,
    rows,
    counts,
    lengths,
    cache,
    B,
    T,
    C,
    NEW,
    ROWS,
    COUNTS,
    LENGTHS,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (2·layers·B·Hkv, tiles of J).

    ``NEW``: elements from one layer to the next; ``ROWS``, ``COUNTS``, ``LENGTHS``: from one sequence to the next.
    """
    pair = tl.program_id(0).to(tl.int64)
    own = pair % (B * HEADS)  # among those of a layer
    batch = own // HEADS
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PAD)
    place = tl.load(lengths + batch * LENGTHS) + j
    wanted = (j < tl.load(counts + batch * COUNTS)) & (place < C)
    row = tl.load(rows + batch * ROWS + j, mask=wanted, other=0)
    there = wanted[:, None] & (dims < D)[None, :]
    source = new + pair // (B * HEADS) * NEW + (own * T + row)[:, None] * D + dims[None, :]
    tl.store(cache + (pair * C + place)[:, None] * D + dims[None, :], tl.load(source, mask=there), mask=there)


def write_rows(new: Tensor, rows: Tensor, counts: Tensor, lengths: Tensor, cache: Tensor) -> None:
    """Write rows of ``new`` into ``cache``, in place.

    Args:
        new: ``[2·layers, B, Hkv, T, D]`` keys and values of a call; each layer's are contiguous.
        rows: ``[B, J]`` int64, which of them were accepted, in order; each below T. counts: ``[B]`` int64, how many, at most J.
        lengths: ``[B]`` int64, rows of the cache in use; what would fall beyond its end is not written. These three may be
            columns of one table.
        cache: ``[2·layers, B, Hkv, C, D]`` of the same dtype, contiguous.
    """
    layers, batch, heads, t, d = new.shape
    if rows.shape[1]:
        write[(layers * batch * heads, triton.cdiv(rows.shape[1], TILE))](
            new, rows, counts, lengths, cache, batch, t, cache.shape[3],
            new.stride(0), rows.stride(0), counts.stride(0), lengths.stride(0),
            HEADS=heads, D=d, PAD=max(16, triton.next_power_of_2(d)), TILE=TILE,
        )  # fmt: skip
