"""The operator over a pool of blocks, OpenVINO's kernel of ours, against one plain softmax a row."""

from itertools import pairwise

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest

from engines import cpu
from engines.kept import move
from engines.paged import BLOCK
from plugins.openvino import library

SHOWN = {"f32": np.float32, "f16": np.uint8, "pairs": np.int8}  # as what the operator is given a pool


FORMS = [(each, kept) for each in library.ALL for kept in SHOWN if each.lanes == 16 or kept != "pairs"]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0].name}-{form[1]}")
def form(request):
    return request.param


@pytest.fixture(scope="module")
def instructions(form):
    return form[0]


@pytest.fixture(scope="module")
def kept(form):
    """What the pools hold."""
    if form[1] == "pairs" and not cpu.has("avx512_bf16"):
        pytest.skip("the CPU has no avx512_bf16")
    return form[1]


def rounded(x, kept):
    """As a pool keeps it, in f32."""
    if kept == "pairs":
        bits = x.astype(np.float32).view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x.astype(np.float16 if kept == "f16" else np.float32).astype(np.float32)


def laid(rows, kept, kind):
    """The pool of keys or values ``[.., BLOCK, D]``, which are rounded already."""
    if kept != "pairs":
        return rows.astype(np.float16 if kept == "f16" else np.float32)
    *more, size, dim = rows.shape
    bits = (rows.view(np.uint32) >> 16).astype(np.uint16)
    if kind == "k":
        bits = bits.reshape(*more, size, dim // 2, 2).swapaxes(-3, -2)
    else:
        bits = bits.reshape(*more, size // 2, 2, dim).swapaxes(-2, -1)[..., ::-1]
    return np.ascontiguousarray(bits).reshape(rows.shape)


def read(pool, kept, kind):
    """What ``laid`` laid."""
    if kept != "pairs":
        return pool.astype(np.float32)
    *more, size, dim = pool.shape
    if kind == "k":
        bits = pool.reshape(*more, dim // 2, size, 2).swapaxes(-3, -2)
    else:
        bits = pool.reshape(*more, size // 2, dim, 2)[..., ::-1].swapaxes(-2, -1)
    return (bits.reshape(pool.shape).astype(np.uint32) << 16).view(np.float32)


def operator(factory, heads, kv_heads, dim, scale, kept, turns=False):
    pool, width = (np.float32, dim) if kept == "f32" else (SHOWN[kept], 2 * dim)
    kinds = [np.float32] * 3 + [pool] * 2 + [np.int32] * 4 + [np.uint8, np.int32] + [np.float32] * 2 * turns
    shapes = [[-1, heads * dim], *[[-1, kv_heads * dim]] * 2, *[[-1, kv_heads, BLOCK, width]] * 2, *[[-1]] * 6]
    shapes += [[-1, dim]] * 2 * turns
    inputs = [op.parameter(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    about = {"heads": heads, "kv_heads": kv_heads, "scale": scale, "turns": turns}
    node = factory.create("CascadeAttention", inputs, about)
    return ov.Core().compile_model(ov.Model([node.output(0)], inputs), "CPU").create_infer_request()


def run(request, given):
    shown = {np.dtype(np.float16): np.uint8, np.dtype(np.uint16): np.int8}
    for i, each in enumerate(given):
        request.set_input_tensor(i, ov.Tensor(each.view(shown.get(each.dtype, each.dtype)), shared_memory=True))
    request.infer()
    return request.get_output_tensor().data.copy()


def tree_mask(rng, n):
    """Each row sees itself and some rows before it."""
    return np.tril(rng.random((n, n)) < 0.5) | np.eye(n, dtype=bool)


def expected(q, k, v, past, masks, lengths, scale, kept="f32"):
    """``[R, H, D]``; past: K and V of each sequence, ``[L, Hkv, D]``."""
    out, begin = np.zeros(q.shape), 0
    group = q.shape[1] // k.shape[1]
    q = rounded(q * np.float32(scale), "pairs" if kept == "pairs" else "f32")
    for (past_k, past_v), mask, length in zip(past, masks, lengths, strict=True):
        n = len(mask)
        keys = np.concatenate([past_k, k[begin : begin + n]]).astype(np.float64)
        values = np.concatenate([past_v, v[begin : begin + n]]).astype(np.float64)
        sees = np.concatenate([np.ones((n, length), bool), mask], 1)
        for head in range(q.shape[1]):
            scores = q[begin : begin + n, head] @ keys[:, head // group].T
            weights = np.where(sees, np.exp(scores - np.where(sees, scores, -np.inf).max(-1, keepdims=True)), 0)
            weights = rounded(weights, kept).astype(np.float64) if kept == "pairs" else weights
            out[begin : begin + n, head] = weights / weights.sum(-1, keepdims=True) @ values[:, head // group]
        begin += n
    return out


# Lengths of the past, and rows of the call: N = 1, nothing before it, both sides of a block's border, many sequences.
CASES = [([0], [1]), ([31], [1]), ([32], [2]), ([33], [8]), ([700], [12]), ([0, 5, 64, 0], [3, 1, 40, 1]), ([100] * 5, [1] * 5)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (6, 2, 80), (1, 1, 128)])
@pytest.mark.parametrize(("lengths", "counts"), CASES, ids=str)
def test_a_row_sees_its_past_and_what_its_mask_says(factory, heads, kv_heads, dim, lengths, counts, kept):
    rng = np.random.default_rng(heads + len(lengths))
    scale = dim**-0.5
    blocks = [-(-(length + n) // BLOCK) for length, n in zip(lengths, counts, strict=True)]
    order = rng.permutation(sum(blocks) + 3).astype(np.int32)
    rows = [rounded(rng.normal(size=(len(order), kv_heads, BLOCK, dim)), kept) for _ in "kv"]
    q, k, v = (rng.normal(size=(sum(counts), width, dim)).astype(np.float32) * 3 for width in (heads, kv_heads, kv_heads))
    masks = [tree_mask(rng, n) for n in counts]
    begins = np.cumsum([0, *blocks])
    tables = [order[a:b] for a, b in pairwise(begins)]
    past = [
        tuple(each[table].swapaxes(1, 2).reshape(-1, kv_heads, dim)[:length] for each in rows)
        for table, length in zip(tables, lengths, strict=True)
    ]
    pools = [laid(each, kept, kind) for each, kind in zip(rows, "kv", strict=True)]
    own_k, own_v = rounded(k, kept), rounded(v, kept)
    flat = [np.ascontiguousarray(x.reshape(len(x), -1)) for x in (q, k, v)]
    told = [lengths, np.cumsum([0, *counts]), order[: begins[-1]], begins]
    numbers = [np.array(each, np.int32) for each in told]
    bias = np.concatenate([mask.reshape(-1) for mask in masks]).astype(np.uint8)
    squares = np.cumsum([0, *(n * n for n in counts)]).astype(np.int32)
    out = run(operator(factory, heads, kv_heads, dim, scale, kept), [*flat, *pools, *numbers, bias, squares])
    wanted = expected(q, own_k, own_v, past, masks, lengths, scale, kept)
    # A weight between two bf16 numbers may be rounded to either.
    np.testing.assert_allclose(out.reshape(q.shape), wanted, atol=2e-2 if kept == "pairs" else 2e-5)
    assert np.abs(out.reshape(q.shape) - wanted).mean() < 1e-5
    for pool, new, before, kind in zip(pools, (own_k, own_v), rows, "kv", strict=True):
        begin, now = 0, read(pool, kept, kind)
        for table, length, n in zip(tables, lengths, counts, strict=True):
            own = now[table].swapaxes(1, 2).reshape(-1, kv_heads, dim)
            np.testing.assert_array_equal(own[length : length + n], new[begin : begin + n], "it lies behind the past")
            begin += n
        others = order[begins[-1] :]
        np.testing.assert_array_equal(now[others], before[others], "nobody else's block is touched")


def test_a_row_that_sees_none_of_its_call_asks_for_nothing(factory):
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(3, 16)).astype(np.float32) for _ in range(3))
    pools = [rng.normal(size=(2, 1, BLOCK, 16)).astype(np.float32) for _ in "kv"]
    mask = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
    past = [tuple(pool[1].swapaxes(0, 1)[:5].copy() for pool in pools)]
    numbers = [np.array(each, np.int32) for each in ([5], [0, 3], [1], [0, 1])]
    given = [q, k, v, *pools, *numbers, mask.reshape(-1).astype(np.uint8), np.array([0, 9], np.int32)]
    out = run(operator(factory, 1, 1, 16, 0.5, "f32"), given)
    want = expected(q[:, None], k[:, None], v[:, None], past, [mask], [5], 0.5)[:, 0]
    np.testing.assert_allclose(out[1], want[1], atol=2e-6)
    assert not out[[0, 2]].any()


def test_scores_far_apart(factory):
    """The likeliest key comes last, far above all others: what was gathered before it fades to nothing."""
    q = np.full((1, 16), 20.0, np.float32)
    k = np.full((1, 16), 1.0, np.float32)
    pools = [np.full((2, 1, BLOCK, 16), -1.0, np.float32), np.full((2, 1, BLOCK, 16), 5.0, np.float32)]
    numbers = [np.array(each, np.int32) for each in ([40], [0, 1], [0, 1], [0, 2])]
    given = [q, k, np.full((1, 16), 7.0, np.float32), *pools, *numbers, np.ones(1, np.uint8), np.array([0, 1], np.int32)]
    np.testing.assert_allclose(run(operator(factory, 1, 1, 16, 1.0, "f32"), given), np.full((1, 16), 7.0))


@pytest.mark.parametrize("length", [0, 25, 31, 64, 700])
def test_a_row_of_a_tree_is_that_of_a_chain_to_the_bit(factory, length, kept):
    """Keys that a row does not see lie between those that it does, over a block's border, and change nothing at all."""
    rng = np.random.default_rng(length)
    heads, kv_heads, dim, n = 6, 2, 64, 12
    path = [0, 3, 4, 7, 11]  # of the tree's rows, from the anchor down
    q, k, v = (rng.normal(size=(n, width * dim)).astype(np.float32) * 2 for width in (heads, kv_heads, kv_heads))
    mask = tree_mask(rng, n)
    for place, row in enumerate(path):
        mask[row] = False
        mask[row, path[: place + 1]] = True
    shape = -(-(length + n) // BLOCK), kv_heads, BLOCK, dim
    pools = [laid(rounded(rng.normal(size=shape), kept), kept, kind) for kind in "kv"]

    def called(rows, mask):
        tables = np.arange(len(pools[0]), dtype=np.int32)
        numbers = [np.array(each, np.int32) for each in ([length], [0, len(rows)], tables, [0, len(tables)])]
        given = [np.ascontiguousarray(x[rows]) for x in (q, k, v)] + [pool.copy() for pool in pools] + numbers
        bias = [mask.reshape(-1).astype(np.uint8), np.array([0, mask.size], np.int32)]
        return run(operator(factory, heads, kv_heads, dim, dim**-0.5, kept), given + bias)

    tree = called(list(range(n)), mask)[path]
    np.testing.assert_array_equal(tree, called(path, np.tri(len(path), dtype=bool)))


def test_queries_and_keys_are_turned_by_their_positions(factory, kept):
    """As if they had come turned, the keys in the pool too."""
    rng = np.random.default_rng(8)
    heads, kv_heads, dim, n, length = 6, 2, 48, 5, 30
    q, k, v = (rng.normal(size=(n, width * dim)).astype(np.float32) for width in (heads, kv_heads, kv_heads))
    angles = rng.uniform(0, 7, (n, dim)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)

    def turned(x):
        x = x.reshape(n, -1, dim)
        other = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return (x * cos[:, None] + other * sin[:, None]).reshape(n, -1)

    pools = [laid(rounded(rng.normal(size=(2, kv_heads, BLOCK, dim)), kept), kept, kind) for kind in "kv"]
    numbers = [np.array(each, np.int32) for each in ([length], [0, n], [1, 0], [0, 2])]
    told = [*numbers, tree_mask(rng, n).reshape(-1).astype(np.uint8), np.array([0, n * n], np.int32)]
    results = []
    for given, turns in (((turned(q), turned(k), v), False), ((q, k, v), True)):
        own = [pool.copy() for pool in pools]
        about = [cos, sin] if turns else []
        results.append(
            (run(operator(factory, heads, kv_heads, dim, dim**-0.5, kept, turns), [*given, *own, *told, *about]), own)
        )
    (expected, there), (out, here) = results
    close = {"f32": 1e-5, "f16": 4e-3, "pairs": 4e-2}[kept]  # a key between two numbers may be rounded to either
    np.testing.assert_allclose(out, expected, atol=close)
    for one, other, kind in zip(here, there, "kv", strict=True):
        np.testing.assert_allclose(read(one, kept, kind), read(other, kept, kind), atol=close)


def test_rows_are_moved_to_where_they_belong(kept):
    """In every layer, from odd places to even ones and back, within a block and into another."""
    rng = np.random.default_rng(9)
    rows = rounded(rng.normal(size=(4, 3, 2, BLOCK, 16)), kept)
    cache = np.stack([laid(each, kept, "kv"[layer % 2]) for layer, each in enumerate(rows)])
    block, place, to_block, to_place = [0, 0, 1], [3, 6, 31], [0, 0, 2], [2, 3, 0]
    move(cache, kept, block, place, to_block, to_place)
    rows[:, to_block, :, to_place] = rows[:, block, :, place]
    np.testing.assert_array_equal([read(each, kept, "kv"[layer % 2]) for layer, each in enumerate(cache)], rows)
