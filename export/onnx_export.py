"""A graph's module → one ONNX file that every runtime reads, the operator's body inside."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from export.blocks import CODES
from export.drafter import Drafter
from export.target import Target
from plugins.cascade_attention.op import add_function_body

OPSET, BLOCKS_OPSET = 18, 21
DYNAMIC = torch.export.Dim.DYNAMIC

# The dynamic axes by name; a runtime sizes its outputs by them. T is what a query can see among the new keys.
TARGET_AXES = {
    "token_ids": "BN",
    "positions": "BN",
    "mask": "BNT",
    "past_lengths": "B",
    "logits": "BN",
    "features": "BN",
}
DRAFTER_AXES = {
    "features": "BM",
    "block_ids": "BN",
    "positions": "BT",
    "mask": "BNT",
    "past_lengths": "B",
    "tokens": "BN",
    "confidences": "BN",
}


def export_target(target: Target, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the target's graph (bindings: ``export/target.py``) to ``path``, its weights to ``path`` + ``.data``.

    Args:
        dtype: of weights, activations and caches. The module is turned into it.
    """
    config, batch, n = target.model.config, 2, 3
    inputs = {
        "token_ids": torch.zeros(batch, n, dtype=torch.int64),
        "positions": torch.arange(n).repeat(batch, 1),
        "mask": torch.ones(batch, n, n, dtype=torch.bool),
        "past_lengths": torch.tensor([1, 2]),
    }
    _export(target.to(dtype), inputs, ["logits", "features"], TARGET_AXES, "N", config, path, dtype)


def export_drafter(drafter: Drafter, config: PreTrainedConfig, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a drafter's graph (bindings: ``export/drafter.py``) to ``path``, its weights beside it; ``dtype`` as above."""
    batch, m, n = 2, 3, 4
    inputs = {
        "features": torch.zeros(batch, m, drafter.dflash.fc.in_features),
        "block_ids": torch.zeros(batch, n, dtype=torch.int64),
        "positions": torch.arange(m + n).repeat(batch, 1),
        "mask": torch.ones(batch, n, m + n, dtype=torch.bool),
        "past_lengths": torch.tensor([1, 2]),
    }
    _export(drafter.to(dtype), inputs, ["tokens", "confidences"], DRAFTER_AXES, "M", config, path, dtype)


def _export(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: list[str],
    axes: dict[str, str],
    new_axis: str,
    config: PreTrainedConfig,
    path: Path,
    dtype: torch.dtype,
) -> None:
    """Export, the K/V bindings of each layer added to inputs and outputs; ``new_axis`` counts the new rows."""
    layers, capacity = config.num_hidden_layers, 5
    shape = (len(inputs["past_lengths"]), config.num_key_value_heads, capacity, config.head_dim)
    past = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(layers)]
    cached = [f"{kind}_{layer}" for layer in range(layers) for kind in "kv"]
    dynamic = [dict.fromkeys(range(tensor.ndim), DYNAMIC) for tensor in inputs.values()]
    if "features" in inputs:
        dynamic[0] = {0: DYNAMIC, 1: DYNAMIC}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            (*inputs.values(), past),
            dynamic_shapes=(*dynamic, [({0: DYNAMIC, 2: DYNAMIC},) * 2] * layers),
            input_names=[*inputs, *(f"past_{name}" for name in cached)],
            output_names=[*outputs, *(f"new_{name}" for name in cached)],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    _simplify(program.model)
    program.save(path, external_data=True)
    model = onnx.load(path, load_external_data=False)
    named = axes | {f"past_{name}": "B C" for name in cached} | {f"new_{name}": f"B {new_axis}" for name in cached}
    for value in (*model.graph.input, *model.graph.output):
        for dim, axis in zip(value.type.tensor_type.shape.dim, named[value.name], strict=False):
            if axis != " ":
                dim.dim_param = axis
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with this machine's paths
    add_function_body(model)
    onnx.save(model, path)
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        _pack(path)


def _simplify(model: ir.Model) -> None:
    """Fold constants, and leave out what is there twice or for nothing.

    The exporter's own ``optimize`` rewrites by patterns besides, some of which it seeks with a square of the nodes: two minutes
    for a target of 30 layers, for six nodes of 2,400.
    """
    optimizer.fold_constants(model)
    steps = [
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ]
    ir.passes.Sequential(*steps)(model)


def _pack(path: Path) -> None:
    """Quantised weights in ONNX's own form: 4-bit codes two in a byte, under the opset that knows blocks."""
    model = onnx.load(path)
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = BLOCKS_OPSET
    for tensor in model.graph.initializer:
        if tensor.name.endswith(f".{CODES}"):
            codes = onnx.numpy_helper.to_array(tensor).reshape(-1)
            packed = (codes[0::2] & 15) | ((codes[1::2] & 15) << 4)
            name, dims = tensor.name, list(tensor.dims)
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.raw_data = name, onnx.TensorProto.INT4, packed.astype(np.uint8).tobytes()
            tensor.dims.extend(dims)
    data = path.with_name(f"{path.name}.data")
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of what is none of the user's doing."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
