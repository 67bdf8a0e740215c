"""``d2sd::CascadeAttention``: its schema, and how a PyTorch module emits it.

| binding      | shape            | dtype       | meaning                                            |
|--------------|------------------|-------------|----------------------------------------------------|
| q            | [B, Hq, N, D]    | f32/f16/bf16| queries, rotated                                   |
| k_new, v_new | [B, Hkv, T, D]   | as q        | keys and values of this call; Hkv divides Hq       |
| past_k, past_v | [B, Hkv, C, D] | as q        | cache buffers, finite everywhere                   |
| past_lengths | [B]              | int64       | rows of the cache in use, 0 to C                   |
| mask         | [B, N, T]        | bool        | true where query n sees new key t                  |
| out          | [B, Hq, N, D]    | as q        | zero where a query sees no key                     |

Attribute ``scale`` (float) multiplies the scores. One operator serves prefill (causal mask), tree verification
(ancestor mask), a DFlash block (all ones) and K redraft branches (block-diagonal).

Two options, in the reference and in the kernel; the graphs built so far need neither, so no graph carries them yet:

| option       | shape            | meaning                                                                        |
|--------------|------------------|--------------------------------------------------------------------------------|
| window       | attribute, int   | a query sees a key only if it stands less than ``window`` positions behind it   |
| sinks        | [Hq] f32         | a learned score per query head that joins the softmax's denominator (GPT-OSS)   |

Under a window the mask says where a query stands, so that positions need no binding of their own: of the s new keys that
a query sees, in their order, the i-th stands at position past_length + i, and the query at past_length + s - 1. That is
so for a causal mask and for ancestors in the order of the tree; a window has no meaning for the other two masks.
A window of 1 leaves each query itself alone.
"""

import onnx
import torch
from torch import Tensor

from plugins.cascade_attention import function_body, reference
from plugins.cascade_attention.blocks import block_attention

DOMAIN, NAME, VERSION = function_body.DOMAIN, function_body.CascadeAttention.name, function_body.VERSION


def cascade_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_lengths: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """Emit the operator while a graph is exported, compute it otherwise. Arguments as in the table."""
    if torch.onnx.is_in_onnx_export():
        inputs = (q, k_new, v_new, past_k, past_v, past_lengths, mask)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}", inputs, {"scale": scale}, dtype=q.dtype, shape=q.shape, version=VERSION
        )
    if past_k.shape[2] == 0:  # training, where a query sees no block but its own (blocks.py)
        return block_attention(q, k_new, v_new, mask, scale)
    if q.is_cuda and not torch.is_grad_enabled():
        from plugins.cascade_attention import kernel  # needs Triton, which a machine without a GPU does not have

        q, k_new, v_new, past_k, past_v, mask = (x.contiguous() for x in (q, k_new, v_new, past_k, past_v, mask))
        return kernel.cascade_attention(q, k_new, v_new, past_k, past_v, past_lengths, mask, scale)
    return reference.cascade_attention(q, k_new, v_new, past_k, past_v, past_lengths, mask, scale)


def add_function_body(model: onnx.ModelProto) -> None:
    """Append the operator's body to a model that uses it, so that any ONNX runtime can inline it.

    A runtime with a kernel of its own (TensorRT's parser with ENABLE_PLUGIN_OVERRIDE) takes that instead.
    """
    model.functions.append(function_body.CascadeAttention.to_function_proto())
    if DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
