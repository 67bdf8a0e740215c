"""The operator in Triton's language: ``attend``, and ``merge`` where the prefix was cut. Bindings: ``op.py``.

The query heads that share a KV head lie next to each other, so their G·N queries are the rows of one matrix as it is.
``attend`` takes a tile of these rows through a stretch of keys, by online softmax: one of S stretches of the committed
prefix (level 0, no mask), or all new keys (level 1, under the mask). Each leaves a state, as FlashInfer calls it: the
normalised output of the keys seen, and the base-2 logarithm of their summed weights. ``merge`` joins a row's S + 1 states.
Where there are tiles enough to fill the device, one program takes a tile through all keys instead, and nothing is merged.

| state        | shape              | dtype | meaning                                              |
|--------------|--------------------|-------|------------------------------------------------------|
| outs         | [S+1, B·Hq·N, D]   | f32   | per stretch; written only where the row saw a key    |
| lses         | [S+1, B·Hq·N]      | f32   | -inf where the row saw none                          |

How many stretches there are follows from shapes, how long they are from ``past_lengths``, on the device: a cache far
larger than what is in it costs empty programs and no reads. All sums run in one order, so a repeated call gives the
same bits.
"""

# mypy: disable-error-code=no-untyped-def
# What stands under @triton.jit is not Python's to type.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_SIZES = (64, 80, 96, 128, 256)
PROGRAMS = 256  # enough for every multiprocessor of an H200 (132) or B200 (148), and for most of them two
SHORTEST = 128  # keys of a stretch, at least, before the prefix is cut once more
MERGED = 16  # rows that a program of ``merge`` takes
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:  # its bf16 are integers, which it would multiply as such
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _cast(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # it cuts off, where a GPU rounds to the nearest
        x = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _take(
    q,
    keys,
    values,
    mask,
    start,
    stop,
    oldest,
    seen,
    total,
    m,
    total_weight,
    acc,
    scale,
    MASK: tl.constexpr,
    EDGE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Take one block of keys into the running softmax of a tile's rows.

    ``keys`` and ``values`` are pointers to the first row, ``mask`` to each row's first entry (level 1 alone). ``EDGE``: the
    block may reach beyond ``stop``. ``seen``: new keys that each row saw in earlier blocks, ``total`` in all blocks.
    """
    columns = start + tl.arange(0, KEYS)
    dims = tl.arange(0, PAD)
    inside = columns < stop
    if EDGE or PAD != D:
        there = inside[:, None] & (dims < D)[None, :]
        k = tl.load(keys + columns[:, None] * D + dims[None, :], mask=there, other=0.0)
    else:
        k = tl.load(keys + columns[:, None] * D + dims[None, :])
    scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], KEYS], tl.float32)) * scale
    if MASK:
        visible = tl.load(mask[:, None] + columns[None, :], mask=inside[None, :], other=0) != 0
        if WINDOW > 0:
            before = seen[:, None] + tl.cumsum(visible.to(tl.int32), axis=1)  # this key counted
            seen += tl.sum(visible.to(tl.int32), axis=1)
            visible = visible & (total[:, None] - before < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    else:
        if EDGE:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        if WINDOW > 0:
            scores = tl.where(columns[None, :] >= oldest[:, None], scores, float("-inf"))
    peak = tl.maximum(m, tl.max(scores, axis=1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen so far: every weight is exp2(-inf) = 0
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(m - safe)
    total_weight = total_weight * shrink + tl.sum(weights, axis=1)
    if EDGE or PAD != D:
        v = tl.load(values + columns[:, None] * D + dims[None, :], mask=there, other=0.0)
    else:
        v = tl.load(values + columns[:, None] * D + dims[None, :])
    acc = _dot(_cast(weights, v.dtype), v, acc * shrink[:, None])
    return peak, total_weight, acc, seen


@triton.jit(do_not_specialize=["N", "T", "C"])
def attend(
    q,
    k_new,
    v_new,
    past_k,
    past_v,
    past_lengths,
    mask,
    N,
    T,
    C,
    outs,
    lses,
    sinks,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Grid: (tiles of G·N rows, B·Hkv, S + 1), the last stretch being that of the new keys. ``HEADS`` is Hkv.

    ``WHOLE``: one program takes a tile through all of its keys and ``outs`` is the result, ``[B, Hq, N, D]`` of q's dtype;
    the grid is (tiles, B·Hkv, 1), ``lses`` None and ``sinks`` may be None. Else ``sinks`` is None: ``merge`` adds them.
    """
    tile, pair, stretch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    stretches = 1 if WHOLE else tl.num_programs(2) - 1
    batch = pair // HEADS
    count = GROUP * N
    rows = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PAD)
    exists = rows < count
    stored = exists[:, None] & (dims < D)[None, :]
    queries = tl.load(q + (pair * count + rows)[:, None] * D + dims[None, :], mask=stored, other=0.0)
    length = tl.load(past_lengths + batch).to(tl.int32)

    m = tl.full([TILE], float("-inf"), tl.float32)
    total_weight = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, PAD], tl.float32)
    seen = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE], tl.int32)
    oldest = tl.zeros([TILE], tl.int32)
    # Rows behind the last one read the mask of the first: what they make of it is not stored.
    mask_rows = mask + (batch * N + tl.where(exists, rows % N, 0)) * T
    if WINDOW > 0:
        for start in range(0, T, KEYS):
            columns = start + tl.arange(0, KEYS)
            visible = tl.load(mask_rows[:, None] + columns[None, :], mask=(columns < T)[None, :], other=0) != 0
            total += tl.sum(visible.to(tl.int32), axis=1)
        oldest = length + total - WINDOW

    scale = SCALE * LOG2_E
    if stretch < stretches:
        keys, values = past_k + pair * C * D, past_v + pair * C * D
        first = 0
        if WINDOW > 0:
            first = tl.maximum(tl.min(tl.where(exists, oldest, length)), 0) // KEYS * KEYS
        long = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), stretches), KEYS) * KEYS
        begin = tl.minimum(first + stretch * long, length)
        end = tl.minimum(begin + long, length)
        whole = begin + (end - begin) // KEYS * KEYS
        for start in range(begin, whole, KEYS):
            m, total_weight, acc, seen = _take(
                queries, keys, values, mask_rows, start, end, oldest, seen, total, m, total_weight, acc, scale,
                False, False, WINDOW, D, PAD, KEYS,
            )  # fmt: skip
        if whole < end:
            m, total_weight, acc, seen = _take(
                queries, keys, values, mask_rows, whole, end, oldest, seen, total, m, total_weight, acc, scale,
                False, True, WINDOW, D, PAD, KEYS,
            )  # fmt: skip
    if WHOLE or stretch == stretches:
        keys, values = k_new + pair * T * D, v_new + pair * T * D
        for start in range(0, T, KEYS):
            m, total_weight, acc, seen = _take(
                queries, keys, values, mask_rows, start, T, oldest, seen, total, m, total_weight, acc, scale,
                True, True, WINDOW, D, PAD, KEYS,
            )  # fmt: skip

    if WHOLE:
        if sinks is not None:
            sink = tl.load(sinks + pair % HEADS * GROUP + rows // N, mask=exists, other=0.0).to(tl.float32) * LOG2_E
            peak = tl.maximum(m, sink)
            shrink = tl.exp2(m - peak)
            total_weight = total_weight * shrink + tl.exp2(sink - peak)
            acc = acc * shrink[:, None]
        acc = acc / tl.where(total_weight > 0.0, total_weight, 1.0)[:, None]
        tl.store(outs + (pair * count + rows)[:, None] * D + dims[None, :], _cast(acc, outs.dtype.element_ty), mask=stored)
    else:
        some = total_weight > 0.0
        state = stretch.to(tl.int64) * tl.num_programs(1) * count + pair * count + rows
        tl.store(lses + state, tl.where(some, m + tl.log2(tl.where(some, total_weight, 1.0)), float("-inf")), mask=exists)
        acc = acc / tl.where(some, total_weight, 1.0)[:, None]
        tl.store(outs + state[:, None] * D + dims[None, :], acc, mask=stored & some[:, None])


@triton.jit(do_not_specialize=["rows", "states", "N"])
def merge(
    outs,
    lses,
    sinks,
    rows,
    states,
    N,
    out,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (tiles of B·Hq·N rows). The states of a row, in their order, and its head's sink if there are sinks."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PAD)
    exists = row < rows
    peak = tl.full([TILE], float("-inf"), tl.float32)
    sink = peak
    if sinks is not None:
        sink = tl.load(sinks + row // N % QUERY_HEADS, mask=exists, other=0.0).to(tl.float32) * LOG2_E
        peak = sink
    for state in range(states):
        peak = tl.maximum(peak, tl.load(lses + state * rows + row, mask=exists, other=float("-inf")))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.exp2(sink - peak)  # 0 without a sink
    acc = tl.zeros([TILE, PAD], tl.float32)
    for state in range(states):
        weight = tl.exp2(tl.load(lses + state * rows + row, mask=exists, other=float("-inf")) - peak)
        there = (exists & (weight > 0.0))[:, None] & (dims < D)[None, :]  # a state that saw nothing was not written
        acc += weight[:, None] * tl.load(outs + (state * rows + row)[:, None] * D + dims[None, :], mask=there, other=0.0)
        total += weight
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out + row[:, None] * D + dims[None, :], _cast(acc, out.dtype.element_ty), mask=exists[:, None] & (dims < D)[None, :]
    )


@dataclass(frozen=True)
class Config:
    """How ``attend`` is compiled: rows of a tile, keys of a block, warps, stages of its loads."""

    tile: int
    keys: int
    warps: int
    stages: int


def configs(head_size: int, itemsize: int, capability: int) -> list[Config]:
    """The configurations to choose from, the smaller tile first: one for a few rows, one for a tree's.

    They fit into 99 KB of shared memory, but for the largest on sm_90 and sm_100, and spill no registers on sm_90
    (``benchmarks/results/compiled.json``).

    Args:
        itemsize: bytes of an element. capability: of the device, as in sm_90.
    """
    if itemsize == 4:  # no tensor cores: for tests
        return [Config(16, 32, 4, 1), Config(32, 32, 4, 1)]
    padded = pad(head_size)
    if padded <= 64:
        return [Config(16, 64, 4, 2), Config(64, 64, 4, 3)]
    if padded <= 128:
        return [Config(16, 64, 4, 3), Config(64, 32, 8, 3)]
    return [Config(16, 32, 8, 2), Config(64 if capability in (90, 100) else 32, 32, 8, 2)]


def choose(rows: int, head_size: int, itemsize: int, capability: int) -> Config:
    """The configuration for a call of G·N rows: the smaller tile if it holds them, or else the larger."""
    small, large = configs(head_size, itemsize, capability)
    return small if rows <= small.tile else large


def pad(head_size: int) -> int:
    """The head size in the kernel, whose arrays are powers of two."""
    return max(16, triton.next_power_of_2(head_size))


def stretches(batch: int, kv_heads: int, tiles: int, capacity: int) -> int:
    """S: cut the prefix until there are ``PROGRAMS`` programs, but into no more than its capacity is worth."""
    return max(1, min(triton.cdiv(PROGRAMS, batch * kv_heads * tiles), triton.cdiv(capacity, SHORTEST)))


def cascade_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_lengths: Tensor,
    mask: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    config: Config | None = None,
    whole: bool | None = None,
) -> Tensor:
    """Run the operator on PyTorch tensors, which must be contiguous. Arguments and result: ``reference.py``.

    Args:
        config: how to compile ``attend``; left out: by ``choose``.
        whole: one launch, the prefix uncut; left out: where tiles alone fill the device.

    Raises:
        ValueError: a tensor is not contiguous, or the head size is none of ``HEAD_SIZES``.
    """
    batch, query_heads, n, d = q.shape
    kv_heads, capacity, t = past_k.shape[1], past_k.shape[2], k_new.shape[2]
    if d not in HEAD_SIZES:
        raise ValueError(f"q: found head size {d}, allowed: {', '.join(map(str, HEAD_SIZES))}")
    given = {"q": q, "k_new": k_new, "v_new": v_new, "past_k": past_k, "past_v": past_v, "mask": mask}
    for name, tensor in given.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: found strides {tensor.stride()}, allowed: a contiguous tensor")
    group = query_heads // kv_heads
    if config is None:
        major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
        config = choose(group * n, d, q.element_size(), 10 * major + minor)
    tiles = triton.cdiv(group * n, config.tile)
    cut = stretches(batch, kv_heads, tiles, capacity)
    if whole is None:
        whole = cut == 1
    out, total = torch.empty_like(q), batch * query_heads * n
    outs, lses = out, None
    if not whole:
        outs = torch.empty(cut + 1, total, d, dtype=torch.float32, device=q.device)
        lses = torch.empty(cut + 1, total, dtype=torch.float32, device=q.device)
    attend[(tiles, batch * kv_heads, 1 if whole else cut + 1)](
        q, k_new, v_new, past_k, past_v, past_lengths, mask, n, t, capacity, outs, lses, sinks if whole else None,
        SCALE=scale, WINDOW=window or 0, HEADS=kv_heads, GROUP=group, D=d, PAD=pad(d),
        TILE=config.tile, KEYS=config.keys, WHOLE=whole, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not whole:
        merge[(triton.cdiv(total, MERGED),)](
            outs, lses, sinks, total, cut + 1, n, out, QUERY_HEADS=query_heads, D=d, PAD=pad(d), TILE=MERGED
        )
    return out
