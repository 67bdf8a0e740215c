"""A tiny random target with a real tokenizer, and drafters for it, as checkpoints on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from export.drafter import DFlash

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, LAYER_IDS = 36, 6, 2, 8, 3, [0, 2]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}<s>assistant\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: it encodes any text, and random tokens decode to any bytes."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    base.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20, "größer 日本語 🎉"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def target(architecture: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random target. Its weights are large, so that its answers do not repeat themselves."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 300,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "tie_word_embeddings": False,
    } | changes
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**options)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**options)).eval()


def save_target(folder: Path, architecture: str = "llama", **changes) -> Path:
    target(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def drafter_config(**changes) -> Qwen3Config:
    return Qwen3Config(
        **{
            "vocab_size": 300,
            "hidden_size": HIDDEN,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,
            "block_size": 6,
            "num_target_layers": LAYERS,
            "dflash_config": {"target_layer_ids": LAYER_IDS, "mask_token_id": 299},
        }
        | changes
    )


def save_drafter(
    folder: Path, seed: int = 1, draft_vocabulary: int | None = None, learned_mask: bool = True, **changes
) -> Path:
    """Write a random drafter in the public format, with or without our two additions to it."""
    torch.manual_seed(seed)
    config = drafter_config(**changes)
    dflash = DFlash(config)
    for parameter in dflash.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    weights = dict(dflash.state_dict())
    if learned_mask:
        weights["mask_embedding"] = torch.randn(HIDDEN)
    if draft_vocabulary:
        chosen = torch.randperm(config.vocab_size)[:draft_vocabulary].sort().values
        weights["d2t"] = chosen - torch.arange(draft_vocabulary)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["DFlashDraftModel"]}))
    return folder


PIPELINE = """
target: {{checkpoint: {root}/target}}
drafters: {{first: {root}/first, second: {root}/second}}
decoding: {{branches: 3}}
engine: {{providers: [{provider}], precision: f32, weights: f32, drafter_weights: f32}}
limits: {{sequences: 3, length: 512, max_tokens: 32}}
"""


def save_pipeline(root: Path, architecture: str = "llama", provider: str = "cpu", **changes) -> Path:
    """Write a whole tiny pipeline into ``root``; returns its file."""
    save_target(root / "target", architecture, **changes)
    save_drafter(root / "first", seed=1, draft_vocabulary=200)
    dflash = {"target_layer_ids": LAYER_IDS, "mask_token_id": 299, "confidence_temperatures": [0.8, 1.0, 1.3]}
    save_drafter(root / "second", seed=2, dflash_config=dflash)
    file = root / "pipeline.yaml"
    file.write_text(PIPELINE.format(root=root, provider=provider))
    return file


LONG = """
target: {{checkpoint: {root}/target}}
decoding: {{mode: autoregressive}}
engine: {{precision: f32}}
limits: {{sequences: 2, waiting: {waiting}, length: 12288, max_tokens: 480}}
"""


def save_long_pipeline(root: Path, waiting: int) -> Path:
    """A tiny target alone with room for answers of seconds, on any machine: not over before something else happens."""
    save_target(root / "target", max_position_embeddings=12288)
    file = root / "pipeline.yaml"
    file.write_text(LONG.format(root=root, waiting=waiting))
    return file
