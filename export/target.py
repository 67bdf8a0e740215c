"""The target's graph: transformers' own modelling code, its attention replaced by ``d2sd::CascadeAttention``.

| binding              | shape                | dtype | meaning                                                   |
|----------------------|----------------------|-------|-----------------------------------------------------------|
| token_ids            | [B, N]               | int64 | prompt chunk, or nodes of the prefix tree                 |
| positions            | [B, N]               | int64 | position of each token in its sequence                    |
| mask                 | [B, N, N]            | bool  | causal (prefill) or ancestors and self (verification)     |
| past_lengths         | [B]                  | int64 | committed rows in the cache                               |
| past_k_i, past_v_i   | [B, Hkv, C, D]       | float | cache buffers of layer i, handed over whole               |
| logits               | [B, N, V]            | f32   | of the token after each node                              |
| features             | [B, N, F]            | f32   | outputs of the layers that the drafters read, joined      |
| new_k_i, new_v_i     | [B, Hkv, N, D]       | float | rows of this call; the caller keeps the accepted ones     |
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from plugins.cascade_attention.op import cascade_attention


@dataclass
class Cascade:
    """What the attention function of a layer needs beyond q, k, v, and the new rows that it leaves behind."""

    past: Sequence[tuple[Tensor, Tensor]]
    past_lengths: Tensor
    mask: Tensor
    new: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    cascade: Cascade,
    **_: Any,
) -> tuple[Tensor, None]:
    past_k, past_v = cascade.past[module.layer_idx]
    cascade.new.append((key, value))
    out = cascade_attention(query, key, value, past_k, past_v, cascade.past_lengths, cascade.mask, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("d2sd_cascade", _attention)
AttentionMaskInterface.register("d2sd_cascade", lambda *_args, **_kwargs: None)


class Target(nn.Module):
    """A causal language model with the bindings above.

    Args:
        model: a transformers Llama or Qwen3. Its attention implementation is set for good.
        feature_layers: layers whose outputs are the drafters' features: id i is ``hidden_states[i + 1]`` (docs/method.md §1).
    """

    def __init__(self, model: PreTrainedModel, feature_layers: Sequence[int]) -> None:
        super().__init__()
        model.set_attn_implementation("d2sd_cascade")
        self.model = model
        self.feature_layers = tuple(feature_layers)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        past_lengths: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Return logits ``[B, N, V]``, features ``[B, N, F]`` and each layer's new (K, V)."""
        cascade = Cascade(past, past_lengths, mask)
        body = self.model.base_model(
            input_ids=token_ids, position_ids=positions, use_cache=False, output_hidden_states=True, cascade=cascade
        )
        features = torch.cat([body.hidden_states[i + 1] for i in self.feature_layers], dim=-1)
        logits = self.model.get_output_embeddings()(body.last_hidden_state)
        return logits.float(), features.float(), cascade.new
