"""A diffusion drafter (DFlash or VP-Drafter: one architecture, two sets of weights) and its graph.

| binding             | shape              | dtype | meaning                                                              |
|---------------------|--------------------|-------|----------------------------------------------------------------------|
| features            | [B, M, F]          | f32   | target features of the tokens committed since the last call          |
| block_ids           | [B, N]             | int64 | blocks of [anchor, kept tokens, masks]; a mask is ``mask_token_id``   |
| positions           | [B, M + N]         | int64 | position in its sequence of each feature row, then of each block token |
| mask                | [B, N, M + N]      | bool  | the valid feature rows, then the tokens of the same block            |
| past_lengths        | [B]                | int64 | committed rows in this drafter's cache; the M new ones follow them   |
| past_k_i, past_v_i  | [B, Hkv, C, D]     | float | cache buffers of layer i, handed over whole                          |
| tokens              | [B, N, A]          | int64 | likeliest tokens at each place, best first                           |
| confidences         | [B, N, A]          | f32   | their probabilities                                                  |
| new_k_i, new_v_i    | [B, Hkv, M, D]     | float | rows of the M features; those of the block never enter the cache     |

Following DFlash (arXiv 2602.06036): every layer's keys and values are those of the projected features of all
committed tokens, then those of the block itself, which sees itself in both directions.
"""

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from plugins.cascade_attention.op import cascade_attention

# A, tokens a place that leave the graph: the likeliest, the runner-up that an exclusive redraft or a runner_up branch
# takes, and enough of the rest for naive_samples to draw from.
CANDIDATES = 16


class DFlashAttention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        assert config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        block: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        past: tuple[Tensor, Tensor],
        past_lengths: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        m = context.shape[1]
        keyed = torch.cat([context, block], dim=1)
        q = self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2)
        k = self.k_norm(self._heads(self.k_proj(keyed))).transpose(1, 2)
        v = self._heads(self.v_proj(keyed)).transpose(1, 2)
        cos, sin = rotary
        q, _ = apply_rotary_pos_emb(q, q, cos[:, m:], sin[:, m:])
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        out = cascade_attention(q, k, v, past[0], past[1], past_lengths, mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(-2)), (k[:, :, :m], v[:, :, :m])


class DFlashLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        block: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        past: tuple[Tensor, Tensor],
        past_lengths: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, new = self.self_attn(self.input_layernorm(block), context, rotary, mask, past, past_lengths)
        block = block + attended
        return block + self.mlp(self.post_attention_layernorm(block)), new


class DFlash(nn.Module):
    """The drafter's own weights, under the names of the public checkpoint format (z-lab, SpecForge).

    Args:
        config: a Qwen3 configuration with ``block_size`` and ``dflash_config.target_layer_ids``.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        features = len(config.dflash_config["target_layer_ids"]) * config.hidden_size
        self.layers = nn.ModuleList(DFlashLayer(config) for _ in range(config.num_hidden_layers))
        self.fc = nn.Linear(features, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    def forward(
        self,
        block: Tensor,
        features: Tensor,
        positions: Tensor,
        mask: Tensor,
        past_lengths: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the layers over embedded blocks ``[B, N, H]``.

        Returns:
            Normed hidden states ``[B, N, H]`` and each layer's (K, V) of the features, ``[B, Hkv, M, D]``.
        """
        context = self.hidden_norm(self.fc(features.to(block.dtype)))
        rotary = self.rotary_emb(block, positions)
        new = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            block, rows = layer(block, context, rotary, mask, layer_past, past_lengths)
            new.append(rows)
        return self.norm(block), new


class Drafter(nn.Module):
    """DFlash between the target's embedding and head, with the bindings above.

    Args:
        dflash: the layers.
        embedding: ``[V', H]`` the target's input embedding, with one row more for a learned mask embedding.
        head: ``[Vd, H]`` the target's output rows for the draft vocabulary.
        draft_ids: ``[Vd]`` int64, the target's token of each head row; None where both vocabularies are one.
        temperatures: ``[D]`` f32, calibration: the d-th masked place of a block has its logits divided by the d-th before the
            probabilities are taken, places beyond D by the last; None leaves them.
        mask_id: the id of a masked place in ``block_ids``.
    """

    draft_ids: Tensor | None
    temperatures: Tensor | None

    def __init__(
        self,
        dflash: DFlash,
        embedding: Tensor,
        head: Tensor,
        draft_ids: Tensor | None = None,
        temperatures: Tensor | None = None,
        mask_id: int = -1,
    ) -> None:
        super().__init__()
        self.dflash = dflash
        self.mask_id = mask_id
        self.embedding = nn.Embedding.from_pretrained(embedding)
        vocabulary, hidden = head.shape
        self.head = nn.Linear(hidden, vocabulary, bias=False, device="meta")
        self.head.weight = nn.Parameter(head, requires_grad=False)
        self.register_buffer("draft_ids", draft_ids)
        self.register_buffer("temperatures", temperatures)

    def logits(
        self,
        features: Tensor,
        block_ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        past_lengths: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return logits ``[B, N, Vd]`` over the draft vocabulary and the new rows of each layer."""
        block = self.embedding(block_ids)
        hidden, new = self.dflash(block, features, positions, mask, past_lengths, past)
        return self.head(hidden), new

    def forward(
        self,
        features: Tensor,
        block_ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        past_lengths: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        logits, new = self.logits(features, block_ids, positions, mask, past_lengths, past)
        logits = logits.float()
        if self.temperatures is not None:
            depth = masked_depth(block_ids == self.mask_id)
            logits = logits / self.temperatures[(depth - 1).clamp(0, len(self.temperatures) - 1)][..., None]
        best, index = logits.topk(CANDIDATES, dim=-1)
        confidences = torch.exp(best - torch.logsumexp(logits, dim=-1, keepdim=True))
        tokens = index if self.draft_ids is None else self.draft_ids[index]
        return tokens, confidences, new


def masked_depth(masked: Tensor) -> Tensor:
    """How many masked places a block has up to each of its tokens: ``[B, N]`` int64, 0 for the anchor and what is kept.

    Blocks lie one behind the other, and each begins with an anchor, which is never masked: a run of masks is of one block. So
    this asks nothing of the mask, which the graph for paged attention does not have (``export/paged_graph.py``).

    Args:
        masked: ``[B, N]`` bool.
    """
    places = torch.arange(masked.shape[1], device=masked.device)
    behind = places[:, None] >= places
    kept = (behind & ~masked[:, None, :]).long().sum(-1)  # [B, N], up to each token
    return (behind & masked[:, None, :] & (kept[:, None, :] == kept[:, :, None])).long().sum(-1)
