"""Quantised weights as they lie in a GGUF file, or as ``gguf`` rounds them: blocks of codes with a scale, perhaps a minimum.

``w = scale · code + minimum``, exactly as the file says it: nothing is rounded a second time. What a block's numbers mean is
GGUF's specification (ggml's ``block_q4_0`` and its like); ``gguf`` reads the file.

| type | bits | block | codes      | scale       | minimum                |
|------|------|-------|------------|-------------|------------------------|
| Q4_0 | 4    | 32    | -8 to 7    | d           |                        |
| Q4_1 | 4    | 32    | -8 to 7    | d           | m + 8·d                |
| Q8_0 | 8    | 32    | -127 to 127| d           |                        |
| Q4_K | 4    | 32    | -8 to 7    | d·s         | 8·d·s - dmin·m         |
| Q6_K | 6    | 16    | -32 to 31  | d·s         |                        |

In a graph codes are a blocked ``DequantizeLinear`` (ONNX opset 21) in front of a ``MatMul``, which every runtime knows how to
compute without unfolding it. A minimum is a second, small product: of the sums of x over each block, and the minima.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFReader, ReaderTensor, get_tensor_name_map, quants
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

CODES = "codes"  # how the buffers of 4-bit codes are told in a graph


@dataclass(frozen=True)
class Blocks:
    """A matrix ``[N, K]`` in blocks along K.

    Attributes:
        codes: ``[N, K]`` int8. scales: ``[N, K / size]`` f32. minima: as scales, or None where they are all 0.
        bits: that a code needs: 4 or 8.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    minima: NDArray[np.float32] | None
    bits: int

    @property
    def size(self) -> int:
        """Of a block."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self) -> NDArray[np.float32]:
        """The matrix, unfolded."""
        codes = self.codes.reshape(*self.scales.shape, self.size).astype(np.float32)
        weights = codes * self.scales[..., None]
        if self.minima is not None:
            weights += self.minima[..., None]
        return weights.reshape(self.codes.shape)

    def rows(self, order: NDArray[np.int64]) -> "Blocks":
        """The same rows in another order."""
        return Blocks(self.codes[order], self.scales[order], None if self.minima is None else self.minima[order], self.bits)


@lru_cache(maxsize=1)
def _tensors(path: Path, _changed: int) -> list[ReaderTensor]:
    """A file's tensors, read in place. Its vocabulary is read with them, which takes seconds."""
    return GGUFReader(path).tensors


def read_gguf(path: Path) -> dict[str, Blocks]:
    """The quantised matrices of a GGUF file, by its names, as far as their type is one of the table's."""
    found = {}
    for tensor in _tensors(path, path.stat().st_mtime_ns):
        unfold = READERS.get(tensor.tensor_type)
        if unfold and len(tensor.shape) == 2:
            columns, rows = (int(n) for n in tensor.shape)
            found[tensor.name] = unfold(np.asarray(tensor.data).reshape(rows, -1), columns)
    return found


def quantised_types(path: Path | None) -> dict[str, int | None]:
    """The types of a GGUF file's quantised matrices, with the bits of their codes; None for a type that is not in the table."""
    if path is None:
        return {}
    plain = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    types = {t.tensor_type for t in _tensors(path, path.stat().st_mtime_ns) if len(t.shape) == 2} - plain
    return {kind.name: (8 if kind in WIDE else 4) if kind in READERS else None for kind in types}


def _half(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Two bytes, little-endian f16: ``[..., 2]`` to ``[...]``."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """``[..., n]`` bytes to ``[..., 2n]`` codes from -8: all the low halves, then the high ones."""
    return (np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16) - 8).astype(np.int8)


def _q4_0(raw: NDArray[np.uint8], columns: int) -> Blocks:
    blocks = raw.reshape(len(raw), -1, 18)
    return Blocks(_nibbles(blocks[..., 2:]).reshape(-1, columns), _half(blocks[..., :2]), None, 4)


def _q4_1(raw: NDArray[np.uint8], columns: int) -> Blocks:
    blocks = raw.reshape(len(raw), -1, 20)
    scales, minima = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    return _level(_nibbles(blocks[..., 4:]), scales, minima + 8 * scales, columns)


def _level(codes: NDArray[np.int8], scales: NDArray[np.float32], minima: NDArray[np.float32], columns: int) -> Blocks:
    """Blocks with minima ``[N, K / size, size]``. One of scale 0 holds one value, its minimum: said by codes and scale."""
    flat = scales == 0
    codes = np.where(flat[..., None], np.int8(1), codes)
    scales, minima = np.where(flat, minima, scales), np.where(flat, np.float32(0), minima)
    return Blocks(codes.reshape(-1, columns), scales, minima, 4)


def _q8_0(raw: NDArray[np.uint8], columns: int) -> Blocks:
    blocks = raw.reshape(len(raw), -1, 34)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return Blocks(codes.reshape(-1, columns), _half(blocks[..., :2]), None, 8)


def _q4_k(raw: NDArray[np.uint8], columns: int) -> Blocks:
    """Super-blocks of 8 blocks: d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of codes, two blocks in each 32."""
    blocks = raw.reshape(len(raw), -1, 144)
    d, dmin = _half(blocks[..., :2])[..., None], _half(blocks[..., 2:4])[..., None]
    packed = blocks[..., 4:16]
    low, mid, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    s = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1).astype(np.float32)
    m = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=-1).astype(np.float32)
    scales = d * s
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    flat = (len(raw), columns // 32)
    return _level(codes.reshape(*flat, 32), scales.reshape(flat), (8 * scales - dmin * m).reshape(flat), columns)


def _q6_k(raw: NDArray[np.uint8], columns: int) -> Blocks:
    """Super-blocks of 256: 128 bytes of low halves, 64 of the upper two bits, 16 scales, d."""
    blocks = raw.reshape(len(raw), -1, 210)
    packed = blocks[..., :128].reshape(*blocks.shape[:2], 2, 1, 64)
    low = (packed >> np.array([0, 4], np.uint8)[:, None]) & 15
    packed = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = low.reshape(*blocks.shape[:2], 256) | (high.reshape(*blocks.shape[:2], 256) << 4)
    scales = _half(blocks[..., 208:])[..., None] * np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    codes = (codes.astype(np.int16) - 32).astype(np.int8)
    return Blocks(codes.reshape(-1, columns), scales.reshape(len(raw), -1).astype(np.float32), None, 8)


READERS: dict[GGMLQuantizationType, Callable[[NDArray[np.uint8], int], Blocks]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}


WIDE = {GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q6_K}  # those whose codes need 8 bits


class BlockLinear(nn.Module):
    """A linear layer without bias whose weights stay in blocks, ``[..., K]`` to ``[..., N]``; for export only."""

    scales: Tensor
    minima: Tensor | None

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.size, self.in_features = blocks.size, blocks.codes.shape[1]
        name = CODES if blocks.bits == 4 else "bytes"
        self.name = name
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(blocks.codes.T)))  # [K, N]
        self.register_buffer("scales", torch.from_numpy(np.ascontiguousarray(blocks.scales.T)))
        minima = None if blocks.minima is None else torch.from_numpy(np.ascontiguousarray(blocks.minima.T))
        self.register_buffer("minima", minima)

    def forward(self, x: Tensor) -> Tensor:
        codes: Tensor = getattr(self, self.name)
        weights = _dequantised(codes, self.scales, self.size)
        out = x @ weights
        if self.minima is not None:
            out = out + x.unflatten(-1, (-1, self.size)).sum(-1) @ self.minima
        return out


class BlockEmbedding(nn.Module):
    """An embedding whose rows stay in blocks: only those asked for are unfolded."""

    rows: Tensor
    scales: Tensor

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        assert blocks.minima is None
        self.size = blocks.size
        self.register_buffer("rows", torch.from_numpy(blocks.codes))
        self.register_buffer("scales", torch.from_numpy(blocks.scales))

    def forward(self, ids: Tensor) -> Tensor:
        codes = nn.functional.embedding(ids, self.rows).float()
        scales = nn.functional.embedding(ids, self.scales)
        return (codes.unflatten(-1, (-1, self.size)) * scales[..., None]).flatten(-2)


def _dequantised(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        options: Any = {"axis": 0, "block_size": size}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, scales), options, dtype=scales.dtype, shape=codes.shape, version=21
        )
    return codes * scales.repeat_interleave(size, dim=0)


Find = Callable[[str, nn.Linear | nn.Embedding], Blocks | None]  # what stands for a matrix of this name; None: itself

ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen3": MODEL_ARCH.QWEN3}


def place_blocks(model: nn.Module, find: Find) -> list[str]:
    """Put blocks in the place of a module's matrices, in place; from then on it is for export only.

    Returns:
        Names of the matrices that stay as they are.
    """
    left = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if (blocks := find(name, module)) is None:
            left.append(name)
            continue
        parent, _, own = name.rpartition(".")
        kind = BlockEmbedding if isinstance(module, nn.Embedding) else BlockLinear
        setattr(model.get_submodule(parent), own, kind(blocks))
    return left


def blocks_of_file(model: PreTrainedModel, gguf: Path) -> Find:
    """The blocks of the GGUF file that a model was loaded from, as far as their type is in the table."""
    found, config = read_gguf(gguf), model.config
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    head = model.get_output_embeddings()

    def find(name: str, module: nn.Linear | nn.Embedding) -> Blocks | None:
        tied = config.tie_word_embeddings and module is head
        stored = names.get_name("model.embed_tokens" if tied else name)
        blocks = found.get(f"{stored}.weight")
        if blocks is not None and (order := _order(stored, config, len(blocks.codes))) is not None:
            blocks = blocks.rows(order)
        if blocks is None or (isinstance(module, nn.Embedding) and blocks.minima is not None):
            return None
        same = np.allclose(blocks.dense(), module.weight.detach().numpy(), rtol=1e-5, atol=1e-6)
        return blocks if same else None

    return find


def rounded(weights: NDArray[np.float32], kind: GGMLQuantizationType) -> Blocks | None:
    """A matrix ``[N, K]`` in blocks of a type of the table; None where its blocks do not divide K."""
    columns = weights.shape[1]
    if columns % GGML_QUANT_SIZES[kind][0]:
        return None
    return READERS[kind](quants.quantize(weights, kind), columns)


def _order(stored: str | None, config: PreTrainedConfig, rows: int) -> NDArray[np.int64] | None:
    """llama.cpp turns the rows of q and k of Llama models so that rotated pairs are neighbours: which row belongs where."""
    if config.model_type != "llama" or not stored or not stored.endswith((".attn_q", ".attn_k")):
        return None
    heads = config.num_attention_heads if stored.endswith("_q") else config.num_key_value_heads
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
