"""A drafter while it is trained: its layers between the target's frozen embedding and head.

Features are divided by their typical size in each dimension before ``fc`` reads them: the target's residual stream holds
dimensions thousands of times larger than others, and neither Muon nor bf16 stands that. The division is folded into
``fc`` when the drafter is saved, so that a checkpoint reads raw features as every DFlash drafter does.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config

from export.checkpoints import DRAFT_TO_TARGET, MASK_EMBEDDING, TEMPERATURES, build_drafter, read_drafter, spread_layers
from export.config import BLOCK_SIZE, TrainingSection
from export.drafter import DFlash
from training.blocks import Blocks
from training.corpus import Answer


class Student(nn.Module):
    """The weights to learn, and what they stand on.

    Args:
        config: of the drafter; see ``new_config``.
        target: gives embedding and head, which stay as they are.
        draft_ids: ``[Vd]`` int64, the tokens that the drafter can say.
    """

    embedding: Tensor  # [V, H]
    head: Tensor  # [Vd, H]
    draft_ids: Tensor  # [Vd] the token of a draft index
    to_draft: Tensor  # [V + 1] the draft index of a token, or -1
    scale: Tensor  # [F] typical size of each feature

    def __init__(self, config: Qwen3Config, target: PreTrainedModel, draft_ids: Tensor) -> None:
        super().__init__()
        self.config = config
        self.dflash = DFlash(config)
        embedding, head = embeddings(target)
        self.mask_id = embedding.shape[0]  # never a token: its row is the learned embedding
        self.mask_embedding = nn.Parameter(embedding.mean(0))
        self.register_buffer("embedding", embedding)
        self.register_buffer("head", head[draft_ids])
        self.register_buffer("draft_ids", draft_ids)
        to_draft = torch.full((self.mask_id + 1,), -1)
        to_draft[draft_ids] = torch.arange(len(draft_ids))
        self.register_buffer("to_draft", to_draft)
        self.register_buffer("scale", torch.ones(self.dflash.fc.in_features))

    @classmethod
    def new(cls, options: TrainingSection, target: PreTrainedModel, draft_ids: Tensor, scale: Tensor) -> "Student":
        """Random weights, the residual branches small at first so that training starts from the embedding's own guess."""
        student = cls(new_config(options, target.config), target, draft_ids)
        spread = target.config.initializer_range
        for name, module in student.dflash.named_modules():
            if isinstance(module, nn.Linear):
                small = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=spread * (0.1 if small else 1.0))
        with torch.no_grad():
            nn.init.normal_(student.mask_embedding, std=float(student.embedding.std()))
            # The head meets vectors shaped as the target's last norm shapes them, but starts out undecided.
            student.dflash.norm.weight.copy_(target.get_decoder().norm.weight)
            sample = F.linear(torch.randn(64, target.config.hidden_size) * student.dflash.norm.weight, student.head)
            student.dflash.norm.weight.div_(sample.std())
        student.scale.copy_(scale)
        return student

    @classmethod
    def load(cls, path: Path, target: PreTrainedModel, scale: Tensor | None = None, block_size: int | None = None) -> "Student":
        """Read a saved drafter; with ``scale`` its ``fc`` is unfolded again for training to go on, with γ = ``block_size`` or
        its own."""
        checkpoint = read_drafter(path)
        embedding, head = embeddings(target)
        built, mask_id = build_drafter(checkpoint, target.config, embedding, head)
        draft_ids = built.draft_ids if built.draft_ids is not None else torch.arange(embedding.shape[0])
        checkpoint.config.dflash_config.pop(TEMPERATURES, None)  # those of other weights as soon as training goes on
        checkpoint.config.block_size = block_size or checkpoint.config.block_size
        student = cls(checkpoint.config, target, draft_ids)
        student.dflash.load_state_dict(built.dflash.state_dict())
        with torch.no_grad():
            student.mask_embedding.copy_(built.embedding.weight[mask_id])
            if scale is not None:
                student.scale.copy_(scale)
                student.dflash.fc.weight.mul_(scale)
        return student

    def save(self, path: Path) -> None:
        """Write the drafter in the public DFlash format, fp16."""
        path.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu() for k, v in self.dflash.state_dict().items()}
        weights["fc.weight"] = weights["fc.weight"] / self.scale.cpu()
        weights[MASK_EMBEDDING] = self.mask_embedding.detach().cpu()
        weights = {k: v.to(torch.float16).contiguous() for k, v in weights.items()}
        draft_ids = self.draft_ids.cpu()
        if len(draft_ids) < self.mask_id:
            weights[DRAFT_TO_TARGET] = draft_ids - torch.arange(len(draft_ids))
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_dict() | {"architectures": ["DFlashDraftModel"], "dtype": "float16"}
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def logits(self, features: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
        """Run over training blocks, with the head where ``rows`` ``[S, N]`` (bool) asks. Returns ``[R, Vd]``."""
        return F.linear(self.hidden(features, blocks, rows), self.head)

    def hidden(self, features: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
        """Run over training blocks. Returns what the head is given where ``rows`` ``[S, N]`` (bool) asks: ``[R, H]``."""
        answers, width = features.shape[:2]
        committed = torch.arange(width, device=features.device).expand(answers, -1)
        assert self.config.num_key_value_heads is not None
        empty = features.new_zeros(answers, self.config.num_key_value_heads, 0, self.config.head_dim)
        masked = blocks.ids == self.mask_id
        embedded = F.embedding(blocks.ids.masked_fill(masked, 0), self.embedding)
        embedded = torch.where(masked[..., None], self.mask_embedding, embedded)
        hidden, _ = self.dflash(
            embedded,
            features / self.scale,
            torch.cat([committed, blocks.positions], dim=1),
            blocks.mask,
            torch.zeros(answers, dtype=torch.int64, device=features.device),
            [(empty, empty)] * len(self.dflash.layers),
        )
        return hidden[rows]


def new_config(options: TrainingSection, target: PreTrainedConfig) -> Qwen3Config:
    """A drafter of the target's width."""
    layer_ids = options.target_layer_ids or spread_layers(target.num_hidden_layers, options.layers)
    public: dict[str, Any] = {
        "block_size": options.block_size or BLOCK_SIZE,
        "num_target_layers": target.num_hidden_layers,
        "dflash_config": {"target_layer_ids": layer_ids, "mask_token_id": None},
    }
    return Qwen3Config(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        rms_norm_eps=1e-6,
        rope_parameters=dict(target.rope_parameters),
        max_position_embeddings=target.max_position_embeddings,
        tie_word_embeddings=False,
        **public,
    )


def embeddings(target: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """A target's input embedding and output head, both ``[V, H]``."""
    embedding: Any = target.get_input_embeddings()
    head: Any = target.get_output_embeddings()
    return embedding.weight.detach(), head.weight.detach()


def draft_vocabulary(answers: list[Answer], vocabulary: int, size: int | None) -> Tensor:
    """The tokens that answers use most, in the order of their ids: ``[Vd]`` int64. All of them if ``size`` is None."""
    if size is None or size >= vocabulary:
        return torch.arange(vocabulary)
    counts = Counter(token for answer in answers for token in answer.response_ids)
    ranked = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    seen = set(ranked)
    ranked += [token for token in range(vocabulary) if token not in seen]
    return torch.tensor(sorted(ranked[:size]))


def feature_scale(features: Tensor) -> Tensor:
    """Typical size of each dimension of features ``[R, F]``: ``[F]``. The median, which the few huge rows do not move."""
    return (features.float().abs().median(0).values * 1.4826).clamp(min=1e-3)
