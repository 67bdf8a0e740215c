"""The operator in plain PyTorch: the definition that every other form is compared with."""

import torch
from torch import Tensor


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
) -> Tensor:
    """Attend to the committed prefix (level 0) and, under a mask, to the new keys (level 1).

    The two levels are computed apart and merged by log-sum-exp, as in the cascade inference of FlashInfer:
    with m the maximum over both levels and (o, l) the exp(s - m)-weighted values and their sum,
    the result is (o_0 + o_1) / (l_0 + l_1). Scores and sums are f32, or f64 for f64 input. Differentiable.

    Args:
        q: ``[B, Hq, N, D]`` queries, rotated.
        k_new, v_new: ``[B, Hkv, T, D]`` keys and values of this call. Hkv divides Hq (grouped queries).
        past_k, past_v: ``[B, Hkv, C, D]`` cache buffers. Rows from ``past_lengths`` on are never seen.
        past_lengths: ``[B]`` int64, 0 to C.
        mask: ``[B, N, T]`` bool, true where query n sees new key t.
        scale: multiplies the scores, 1/sqrt(D) as a rule.
        window: a query sees keys less than ``window`` positions before it (``op.py`` says where a query stands).
        sinks: ``[Hq]`` scores that join the softmax's denominator, and bring no value (GPT-OSS).

    Returns:
        ``[B, Hq, N, D]`` of q's dtype. A query that sees no key at all gives zero.
    """
    batch, _, n, d = q.shape
    kv_heads, capacity = past_k.shape[1], past_k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    packed = (q.to(work) * scale).reshape(batch, kv_heads, -1, d)  # [B, Hkv, G·N, D]

    rows = torch.arange(capacity, device=q.device)
    in_past = rows < past_lengths[:, None]  # [B, C]
    seen_past = in_past[:, None, :]  # [B, 1, C], or [B, N, C] under a window
    if window is not None:
        behind = mask.flip(-1).cumsum(-1).flip(-1)  # [B, N, T]: how many seen keys lie from t on
        oldest = past_lengths[:, None] + mask.sum(-1) - window  # [B, N]
        seen_past = seen_past & (rows >= oldest[..., None])
        mask = mask & (behind <= window)
    # 0 * NaN is NaN: what lies in the buffer beyond past_lengths must not even be multiplied.
    past_k = past_k.masked_fill(~in_past[:, None, :, None], 0)
    past_v = past_v.masked_fill(~in_past[:, None, :, None], 0)
    levels = [(past_k, past_v, seen_past[:, None, None]), (k_new, v_new, mask[:, None, None, :, :])]
    levels = [level for level in levels if level[0].shape[2]]

    scores = [
        (packed @ keys.to(work).transpose(-1, -2)).unflatten(2, (-1, n)).masked_fill(~seen, -torch.inf)
        for keys, _, seen in levels
    ]  # [B, Hkv, G, N, C or T]
    peak = torch.stack([s.detach().amax(-1, keepdim=True) for s in scores]).amax(0)
    if sinks is not None:
        sink = sinks.to(work).reshape(kv_heads, -1, 1, 1)  # [Hkv, G, 1, 1]
        peak = torch.maximum(peak, sink.detach())
    peak = peak.masked_fill(peak == -torch.inf, 0)  # nothing seen: every weight below is exp(-inf) = 0
    weights = [torch.exp(s - peak) for s in scores]
    totals = torch.stack([w.sum(-1) for w in weights]).sum(0)
    if sinks is not None:
        totals = totals + torch.exp(sink - peak)[..., 0]
    totals = totals.flatten(2)[..., None]
    outs = [w.flatten(2, 3) @ values.to(work) for w, (_, values, _) in zip(weights, levels, strict=True)]
    return (torch.stack(outs).sum(0) / totals.masked_fill(totals == 0, 1)).reshape(q.shape).to(q.dtype)
