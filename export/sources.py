"""The checkpoints of a pipeline, opened, checked against each other, and exported graph by graph."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedConfig

from engines.engine import GraphInfo
from export import checkpoints, ends
from export.blocks import place_blocks, quantised_types
from export.checkpoints import CheckpointError, DrafterCheckpoint
from export.config import BLOCK_SIZE, CompiledBackend, Pipeline, Weights
from export.drafter import Drafter
from export.onnx_export import export_drafter, export_target
from export.quantise import held_out_prompts, in_blocks, rounded_to, rounder
from export.target import Target

HELD_OUT = Path(__file__).resolve().parent.parent / "training" / "prompts" / "eval.jsonl"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class Sources:
    """What a pipeline is compiled from.

    Attributes:
        folder, config: of the target. gguf: the file that the folder was converted from, if it was.
        weights, drafter_weights: as ``engine`` asks; never ``auto`` of drafters.
        held_out: files of prompts on which rounded weights are held against f32.
        layer_ids: the target's layers whose outputs are its features.
        drafters: ``first`` and ``second``, or none. built: the same, between the target's embedding and head, with the id
            that stands for a mask.
        block_size: γ.
    """

    folder: Path
    gguf: Path | None
    config: PreTrainedConfig
    weights: Weights
    drafter_weights: Literal["f32", "int8", "int4"]
    held_out: list[Path]
    layer_ids: list[int]
    drafters: dict[str, DrafterCheckpoint]
    built: dict[str, tuple[Drafter, int]]
    block_size: int

    @property
    def graphs(self) -> list[str]:
        return ["target", *self.drafters]

    @cached_property
    def _target_hash(self) -> str:
        return checkpoints.fingerprint(self.folder)

    def fingerprints(self, graph: str) -> list[str]:
        """Of what a graph is made of: the target's own, and a drafter's or the layers that the target shows to them."""
        if graph == "target":
            asked = held_out_prompts(self.held_out) if rounded_to(self.weights, quantised_types(self.gguf)) else []
            return [self._target_hash, str(self.layer_ids), self.weights, str(asked)]
        return [self._target_hash, self.drafter_weights, checkpoints.fingerprint(self.drafters[graph].path)]

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return ends.end_ids(self.folder, self.config.vocab_size)

    def export(self, graph: str, path: Path, dtype: str) -> tuple[GraphInfo, dict[str, Any]]:
        """Write a graph's ONNX file, its floats of a PyTorch dtype.

        Returns:
            What its engine needs to know of it, and what was made of its weights (``quantise.py``).
        """
        if graph == "target":
            model, weights = in_blocks(self.folder, self.gguf, self.weights, self.held_out)
            export_target(Target(model, self.layer_ids), path, getattr(torch, dtype))
            config, mask_id = self.config, -1
        else:
            drafter, mask_id = self.built[graph]
            weights = {"form": self.drafter_weights}
            if self.drafter_weights != "f32":
                place_blocks(drafter, rounder(self.drafter_weights))
            config = self.drafters[graph].config
            export_drafter(drafter, config, path, getattr(torch, dtype))
        info = GraphInfo(
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            feature_width=self.config.hidden_size * len(self.layer_ids),
            vocabulary=self.config.vocab_size,
            mask_id=mask_id,
            heads=config.num_attention_heads,
        )
        return info, weights

    def copy_tokenizer(self, folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder)


def open_sources(pipeline: Pipeline) -> Sources:
    """Find and check all checkpoints of a pipeline.

    Raises:
        CheckpointError: one is missing or broken, or they do not fit each other.
    """
    located = checkpoints.locate(pipeline.target.checkpoint, pipeline.target.revision)
    folder, gguf = checkpoints.open_target(located), located if located.is_file() else None
    config = checkpoints.target_config(folder)
    compiled = pipeline.engine.backend in get_args(CompiledBackend)  # TensorRT's networks are typed: no blocks in them yet
    weights: Weights = "f32" if compiled else pipeline.engine.weights
    asked = pipeline.engine.drafter_weights
    drafter_weights = asked if asked != "auto" else "f32" if compiled else "int4"
    held_out = [Path(file) for file in pipeline.training.evaluation_prompts] or [HELD_OUT]
    if pipeline.limits.length > config.max_position_embeddings:
        raise CheckpointError(
            f"limits.length: found {pipeline.limits.length}, allowed: up to {config.max_position_embeddings}, "
            f"the positions that target {folder} knows"
        )
    if pipeline.drafters is None:
        training = pipeline.training
        layer_ids = training.target_layer_ids or checkpoints.spread_layers(config.num_hidden_layers, training.layers)
        block_size = training.block_size or BLOCK_SIZE
        return Sources(folder, gguf, config, weights, drafter_weights, held_out, layer_ids, {}, {}, block_size)
    references = {"first": pipeline.drafters.first, "second": pipeline.drafters.second}
    drafters = {name: checkpoints.read_drafter(checkpoints.locate(path)) for name, path in references.items()}
    first, second = drafters["first"], drafters["second"]
    if first.target_layer_ids != second.target_layer_ids:
        raise CheckpointError(
            f"drafter {second.path}: reads target layers {second.target_layer_ids}, but the first drafter reads "
            f"{first.target_layer_ids}; both are given the same features"
        )
    block_size = pipeline.decoding.block_size or first.block_size
    for drafter in drafters.values():
        if block_size > drafter.block_size:
            raise CheckpointError(
                f"drafter {drafter.path}: trained with blocks of {drafter.block_size}, but decoding.block_size is {block_size}"
            )
    embedding, head = checkpoints.target_embeddings(folder)
    built = {name: checkpoints.build_drafter(drafter, config, embedding, head) for name, drafter in drafters.items()}
    return Sources(
        folder, gguf, config, weights, drafter_weights, held_out, first.target_layer_ids, drafters, built, block_size
    )
