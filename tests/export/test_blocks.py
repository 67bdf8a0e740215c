"""Blocks of a GGUF file say exactly what gguf's own reading of it says, and a graph of them what its model says."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

from export.blocks import READERS, BlockEmbedding, BlockLinear, quantised_types, read_gguf

TYPES = list(READERS)


def raw(kind, rows, columns, seed=0):
    """Random bytes of a type whose scales are small numbers, not infinities."""
    size, width = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // size, width), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}[kind.name]
    for at in halves:
        values = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        values[0, 0] = 0  # a block of one value
        blocks[..., at : at + 2] = values[..., None].view(np.uint8).reshape(*values.shape, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_blocks_are_what_the_file_says(kind, tmp_path):
    rows, columns = 6, 512
    data = raw(kind, rows, columns)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    blocks = read_gguf(tmp_path / "x.gguf")["blk.0.ffn_up.weight"]
    expected = quants.dequantize(data, kind)
    np.testing.assert_allclose(blocks.dense(), expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())
    assert blocks.codes.dtype == np.int8
    assert blocks.bits == 8 or (blocks.codes.min() >= -8 and blocks.codes.max() <= 7)
    assert quantised_types(tmp_path / "x.gguf") == {kind.name: blocks.bits}

    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    scale = np.abs(expected).max() * columns
    np.testing.assert_allclose(BlockLinear(blocks)(x), x.numpy() @ expected.T, atol=1e-6 * scale)
    if blocks.minima is None:
        ids = torch.tensor([[5, 0]])
        np.testing.assert_allclose(BlockEmbedding(blocks)(ids), expected[[[5, 0]]], rtol=2e-6)


def test_a_type_that_is_not_known_is_named(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    weights = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    kind = GGMLQuantizationType.Q5_1
    writer.add_tensor("blk.0.ffn_up.weight", quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert quantised_types(tmp_path / "x.gguf") == {"Q5_1": None}
    assert read_gguf(tmp_path / "x.gguf") == {}
