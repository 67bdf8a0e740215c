"""The operator in standard ONNX operators, for every runtime that has no kernel for it. Bindings: ``op.py``."""

# mypy: ignore-errors
# onnxscript reads this function's source as a language of its own.

from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN, VERSION = "d2sd", 1


# The query heads that share a KV head are packed into one matrix of G·N rows, so the prefix is read once a group
# and never copied: the two levels meet in the scores, whose softmax over both is the log-sum-exp merge.
@script(Opset(DOMAIN, VERSION), default_opset=op)
def CascadeAttention(q, k_new, v_new, past_k, past_v, past_lengths, mask, scale: float):
    q_shape = op.Shape(q)
    batch = op.Shape(q, start=0, end=1)
    n = op.Shape(q, start=2, end=3)
    d = op.Shape(q, start=3, end=4)
    kv_heads = op.Shape(past_k, start=1, end=2)
    capacity = op.Shape(past_k, start=2, end=3)
    t = op.Shape(k_new, start=2, end=3)
    group = op.Div(op.Shape(q, start=1, end=2), kv_heads)
    packed = op.Concat(batch, kv_heads, op.Mul(group, n), d, axis=0)

    grouped = op.Reshape(op.Mul(q, op.CastLike(scale, q)), packed)
    level0 = op.MatMul(grouped, op.Transpose(past_k, perm=[0, 1, 3, 2]))
    level1 = op.MatMul(grouped, op.Transpose(k_new, perm=[0, 1, 3, 2]))

    in_past = op.Less(op.Range(0, op.Squeeze(capacity), 1), op.Unsqueeze(past_lengths, [1]))  # [B, C]
    lowest = op.CastLike(op.Constant(value_float=-3.0e4), q)  # within fp16, and exp(lowest) is 0 in any type
    zero = op.CastLike(op.Constant(value_float=0.0), q)
    bias0 = op.Unsqueeze(op.Where(in_past, zero, lowest), [1, 2])  # [B, 1, 1, C]
    bias1 = op.Unsqueeze(op.Where(mask, zero, lowest), [1])  # [B, 1, N, T], then once a group
    bias1 = op.Tile(bias1, op.Concat([1, 1], group, [1], axis=0))

    scores = op.Concat(op.Add(level0, bias0), op.Add(level1, bias1), axis=-1)
    weights = op.Softmax(scores, axis=-1)
    weights0, weights1 = op.Split(weights, op.Concat(capacity, t, axis=0), axis=-1)
    out = op.Reshape(op.Add(op.MatMul(weights0, past_v), op.MatMul(weights1, v_new)), q_shape)

    sees_new = op.Cast(op.ReduceMax(op.Cast(mask, to=6), [2], keepdims=1), to=9)  # [B, N, 1]
    sees_past = op.Greater(op.Unsqueeze(past_lengths, [1, 2]), 0)
    return op.Where(op.Unsqueeze(op.Or(sees_past, sees_new), [1]), out, zero)
