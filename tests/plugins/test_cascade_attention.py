"""The operator's forms against each other and against a loop over every query."""

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.cascade_attention import op, reference


def brute_force(q, k_new, v_new, past_k, past_v, past_lengths, mask, scale):
    """Softmax over the keys that a query sees, one query at a time, f64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_new.shape[1]
    for b, h, n in np.ndindex(*q.shape[:3]):
        seen, length = mask[b, n], int(past_lengths[b])
        keys = torch.cat([past_k[b, h // group, :length], k_new[b, h // group][seen]]).double()
        values = torch.cat([past_v[b, h // group, :length], v_new[b, h // group][seen]]).double()
        if len(keys):
            out[b, h, n] = torch.softmax(keys @ q[b, h, n].double() * scale, dim=0) @ values
    return out


def inputs(seed, batch=2, kv_heads=2, group=3, n=5, t=7, capacity=9, d=8):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    lengths = torch.randint(0, capacity + 1, (batch,), generator=g)
    lengths[0] = 0 if seed % 2 else capacity  # both edges
    mask = torch.rand(batch, n, t, generator=g) > 0.5
    mask[-1, -1] = False
    q, k, v = draw(batch, kv_heads * group, n, d), draw(batch, kv_heads, t, d), draw(batch, kv_heads, t, d)
    return (
        q,
        k,
        v,
        draw(batch, kv_heads, capacity, d),
        draw(batch, kv_heads, capacity, d),
        lengths,
        mask,
        1 / math.sqrt(d),
    )


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "n": st.integers(1, 9),
        "t": st.integers(1, 11),
        "capacity": st.integers(1, 13),
        "d": st.sampled_from([2, 8, 10]),
    }
)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_reference_equals_brute_force(shape):
    arguments = inputs(**shape)
    torch.testing.assert_close(reference.cascade_attention(*arguments).double(), brute_force(*arguments), atol=2e-6, rtol=1e-5)


def operator_model(scale):
    """A model that is nothing but the operator, with its function body."""
    names = ["q", "k_new", "v_new", "past_k", "past_v", "past_lengths", "mask"]
    types = dict.fromkeys(names, onnx.TensorProto.FLOAT) | {
        "past_lengths": onnx.TensorProto.INT64,
        "mask": onnx.TensorProto.BOOL,
    }
    ranks = dict.fromkeys(names, 4) | {"past_lengths": 1, "mask": 3}
    node = onnx.helper.make_node(op.NAME, names, ["out"], domain=op.DOMAIN, scale=scale)
    values = [onnx.helper.make_tensor_value_info(n, types[n], [f"{n}{i}" for i in range(ranks[n])]) for n in names]
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None] * 4)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "op", values, [out]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    op.add_function_body(model)
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="module")
def session():
    """The operator run by ONNX Runtime from the function body."""
    return ort.InferenceSession(operator_model(1 / math.sqrt(8)).SerializeToString())


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_function_body_equals_reference(session, shape):
    arguments = inputs(**(shape | {"d": 8}))
    feeds = {value.name: a.numpy() for value, a in zip(session.get_inputs(), arguments, strict=False)}
    (found,) = session.run(None, feeds)
    np.testing.assert_allclose(found, reference.cascade_attention(*arguments).numpy(), atol=5e-6)


def test_nothing_beyond_the_prefix_is_read():
    *arguments, lengths, mask, scale = inputs(4, capacity=8)
    lengths = torch.tensor([3, 5])
    expected = reference.cascade_attention(*arguments, lengths, mask, scale)
    for buffer in arguments[3:5]:
        for b, length in enumerate(lengths):
            buffer[b, :, length:] = torch.nan
    torch.testing.assert_close(reference.cascade_attention(*arguments, lengths, mask, scale), expected)


def test_a_query_that_sees_nothing_gives_zero(session):
    q, k, v, past_k, past_v, lengths, mask, scale = inputs(1)
    lengths[:], mask[:, 0] = 0, False
    arguments = (q, k, v, past_k, past_v, lengths, mask, scale)
    assert not reference.cascade_attention(*arguments)[:, :, 0].any()
    feeds = {value.name: a.numpy() for value, a in zip(session.get_inputs(), arguments, strict=False)}
    assert not session.run(None, feeds)[0][:, :, 0].any()


def test_gradients_flow_through_both_levels():
    q, k, v, past_k, past_v, lengths, mask, scale = (
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs(2, n=2, t=3, capacity=2, d=2)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, past_k, past_v)]
    assert torch.autograd.gradcheck(lambda *x: reference.cascade_attention(*x, lengths, mask, scale), leaves)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    blocks=st.integers(1, 4),
    gamma=st.integers(1, 5),
    features=st.integers(0, 6),
)
def test_blocks_attend_to_features_and_to_themselves(seed, heads, blocks, gamma, features):
    """Training's form is the operator's without a prefix, where no block sees another."""
    n = blocks * gamma
    q, k, v, *_, scale = inputs(seed, 2, *heads, n=n, t=features + n)
    seen = torch.rand(2, n, features, generator=torch.Generator().manual_seed(seed)) > 0.5
    own = torch.block_diag(*[torch.ones(gamma, gamma)] * blocks).bool().expand(2, -1, -1)
    empty = q.new_zeros(2, heads[0], 0, 8)
    for x in (q, k, v):
        x.requires_grad_()
    found = op.cascade_attention(
        q, k, v, empty, empty, torch.zeros(2).long(), torch.cat([seen, own.new_ones(2, n, gamma)], -1), scale
    )
    expected = reference.cascade_attention(q, k, v, empty, empty, torch.zeros(2).long(), torch.cat([seen, own], -1), scale)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(found.shape)
    for mine, theirs in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_merged_in_f32(dtype):
    arguments = inputs(6)
    low = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    found = reference.cascade_attention(*low)
    assert found.dtype == dtype
    exact = brute_force(*low)
    assert (found.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 7), window=st.integers(1, 12), tree=st.booleans())
def test_window_and_sinks_equal_brute_force(seed, n, window, tree):
    """Causal or along the branches of a random tree: a query sees the ``window`` last keys of its own past, itself included."""
    q, k, v, past_k, past_v, lengths, _, scale = inputs(seed, n=n, t=n)
    g = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(-1, i, (1,), generator=g)) if tree and i else i - 1 for i in range(n)]
    mask = torch.eye(n, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
    mask = mask.expand(2, n, n)
    sinks = torch.randn(q.shape[1], generator=g)
    found = reference.cascade_attention(q, k, v, past_k, past_v, lengths, mask, scale, window=window, sinks=sinks)
    group = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(*q.shape[:3]):
        keys = torch.cat([past_k[b, h // group, : lengths[b]], k[b, h // group][mask[b, i]]])[-window:].double()
        values = torch.cat([past_v[b, h // group, : lengths[b]], v[b, h // group][mask[b, i]]])[-window:].double()
        scores = torch.cat([keys @ q[b, h, i].double() * scale, sinks[h : h + 1].double()])
        expected = torch.softmax(scores, 0)[:-1] @ values
        torch.testing.assert_close(found[b, h, i].double(), expected, atol=2e-6, rtol=1e-5)
