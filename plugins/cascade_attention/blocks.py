"""Attention of training: many blocks of one sequence at once, each seeing features of its own prefix and itself.

Written as one call of the general operator, most of the scores would be those of blocks with other blocks, which are masked:
for 256 blocks of 8 tokens behind 300 features seven of eight. Here a block's own keys are a level of their own.
"""

import torch
from torch import Tensor


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend to the features and to one's own block. Differentiable; under autocast it multiplies in autocast's type.

    Args:
        q: ``[B, Hq, N, D]``, rotated queries of A blocks of γ tokens, N = A·γ.
        k, v: ``[B, Hkv, M + N, D]``, of M features, then of the blocks. Hkv divides Hq.
        mask: ``[B, N, M + γ]`` bool, true where query n sees feature m, then token j of its own block; one at least.
        scale: multiplies the scores.

    Returns:
        ``[B, Hq, N, D]``.
    """
    batch, kv_heads, keys, d = k.shape
    n = q.shape[2]
    features = keys - n
    gamma = mask.shape[2] - features
    far_k, near_k = k.split([features, n], dim=2)
    far_v, near_v = v.split([features, n], dim=2)
    # Queries of a group of heads are rows of one product, with the features and, block by block, with their own keys.
    grouped = (q * scale).reshape(batch, kv_heads, -1, n // gamma, gamma, d)  # [B, Hkv, G, A, γ, D]
    group = grouped.shape[2]

    def with_own(rows: Tensor, own: Tensor) -> Tensor:
        """``[B, Hkv, G, A, γ, x]`` times each block's own ``[B, Hkv, A, x, y]``: ``[B, Hkv, G·N, y]``."""
        made = rows.transpose(2, 3).flatten(3, 4) @ own  # [B, Hkv, A, G·γ, y]
        return made.unflatten(3, (group, gamma)).transpose(2, 3).flatten(2, 4)

    far = grouped.flatten(2, 4) @ far_k.transpose(-1, -2)  # [B, Hkv, G·N, M]
    near = with_own(grouped, near_k.unflatten(2, (-1, gamma)).transpose(-1, -2))  # [B, Hkv, G·N, γ]
    scores = torch.cat([far, near], dim=-1).unflatten(2, (group, n)).masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).flatten(2, 3)
    far, near = weights.split([features, gamma], dim=-1)
    out = far @ far_v + with_own(near.unflatten(2, (group, n // gamma, gamma)), near_v.unflatten(2, (-1, gamma)))
    return out.unflatten(2, (group, n)).flatten(1, 2)
