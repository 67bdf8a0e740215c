"""An ONNX file for paged attention, beside the first one and with the same weights: what ``engines/openvino.py`` reads.

The graph is rewritten from ``[B, N]`` tokens to one row of all sequences' tokens: B is 1, and the operator is told where each
sequence's rows and cache blocks lie. Bindings of a call over S sequences, besides those of the ONNX file:

| binding              | shape                 | dtype | meaning                                                            |
|----------------------|-----------------------|-------|--------------------------------------------------------------------|
| past_k_i, past_v_i   | [blocks, Hkv, 32, D]  | float | the pool of blocks; K/V of the call's rows are written into it     |
| past_lens            | [S]                   | int32 | rows of each sequence in the cache                                 |
| subsequence_begins   | [S + 1]               | int32 | where each sequence's rows begin                                   |
| block_indices        | [..]                  | int32 | the blocks of the first sequence, of the second, …                 |
| block_indices_begins | [S + 1]               | int32 | where each one's begin                                             |
| max_context_len      | []                    | int32 | rows of the longest, those of the call included                    |
| qq_bias              | [..]                  | uint8 | each sequence's [n, n] mask of its own rows; none sees a later one |
| qq_bias_begins       | [S + 1]               | int32 | where each one's begins                                            |
| asked                | [A]                   | int64 | target: rows whose logits leave                                    |
| key_rows, query_rows | [R]                   | int64 | drafter: what of features and block tokens each row is (paged.py)  |
| out_rows             | [N]                   | int64 | drafter: which rows are the block's answers                        |

``past_lengths``, ``mask`` and the ``new_*`` outputs are gone.

Weights in blocks that have minima come in two forms, each exact. As they are: a product with the codes, and a small one with
the minima, for CPUs that multiply 8-bit codes (VNNI). With zero points, ``(code - zero point) · scale``: one product less,
for CPUs that unfold the codes anyway.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_tensor

from export.blocks import CODES
from plugins.cascade_attention.function_body import CascadeAttention

INT32, INT64, UINT8 = onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.UINT8
PAGED = {
    "past_lens": (INT32, ["S"]),
    "subsequence_begins": (INT32, ["begins"]),
    "block_indices": (INT32, ["blocks"]),
    "block_indices_begins": (INT32, ["begins"]),
    "max_context_len": (INT32, []),
    "qq_bias": (UINT8, ["pairs"]),
    "qq_bias_begins": (INT32, ["begins"]),
}
DRAFTER = {name: (INT64, [name]) for name in ("key_rows", "query_rows", "out_rows")}
ZERO_POINTS, GONE = "zero_points.data", "gone"
TARGET = {"asked": (INT64, ["asked"])}


def write_paged(graph: Path, place: Path) -> None:
    """Write the graph with the bindings above. Both files must lie in one folder.

    Args:
        graph: the ONNX file of a target or drafter (``export/target.py``, ``export/drafter.py``).
    """
    model = onnx.load(graph, load_external_data=False)
    content = model.graph
    drafter = any(value.name == "features" for value in content.input)
    told = PAGED | (DRAFTER if drafter else {})
    for node in content.node:
        if node.op_type == CascadeAttention.name:
            given = list(node.input)[:5]
            del node.input[:]
            node.input.extend([*given, *told])
    if not drafter:
        _select(content)
        told = told | TARGET
    inputs = [value for value in content.input if value.name not in ("mask", "past_lengths")]
    outputs = [value for value in content.output if not value.name.startswith("new_")]
    del content.input[:], content.output[:], content.value_info[:], model.functions[:]
    content.input.extend([*inputs, *(onnx.helper.make_tensor_value_info(name, *kind) for name, kind in told.items())])
    content.output.extend(outputs)
    onnx.save(model, place)
    if any(tensor.name.endswith(".minima") for tensor in content.initializer):
        _with_zero_points(model, place.parent)
        onnx.save(model, place.with_name(f"zero-points-{place.name}"))


def _select(content: onnx.GraphProto) -> None:
    """Gather the asked rows in front of the head."""
    makers = {name: node for node in content.node for name in node.output}
    node = makers["logits"]
    while node.op_type != "MatMul":
        node = makers[node.input[0]]
    hidden = node.input[0]
    for reader in content.node:
        if hidden in reader.input and reader.op_type in ("MatMul", "Reshape"):
            reader.input[list(reader.input).index(hidden)] = "asked_hidden"
    place = next(i for i, each in enumerate(content.node) if hidden in each.output)
    content.node.insert(place + 1, onnx.helper.make_node("Gather", [hidden, "asked"], ["asked_hidden"], axis=1))


def _with_zero_points(model: onnx.ModelProto, folder: Path) -> None:
    """``x·(s·q) + sums(x)·m`` becomes ``x·(s·(q + m / s))``; the new tensors share the codes' bytes."""
    content, make = model.graph, onnx.helper
    tensors = {tensor.name: tensor for tensor in content.initializer}
    readers = {name: node for node in content.node for name in node.input}
    points = bytearray()
    nodes = list(content.node)
    for at, node in enumerate(nodes):
        owner = node.input[0].removesuffix(f".{CODES}") if node.op_type == "DequantizeLinear" else ""
        if f"{owner}.minima" not in tensors:
            continue
        scales, minima = (_values(tensors[f"{owner}.{name}"], folder) for name in ("scales", "minima"))
        groups, columns = scales.shape
        rows = tensors[f"{owner}.{CODES}"].dims[0]
        shape = [groups, rows // groups, columns]
        zero = np.divide(-minima, scales, out=np.zeros_like(minima), where=scales != 0)
        point = onnx.TensorProto(name=f"{owner}.zero_points", data_type=onnx.TensorProto.FLOAT, dims=[groups, 1, columns])
        raw = np.ascontiguousarray(zero).tobytes()
        _elsewhere(point, ZERO_POINTS, len(points), len(raw))
        points += raw
        for name, dims in ((CODES, shape), ("scales", [groups, 1, columns])):
            tensor = tensors[f"{owner}.{name}"]
            tensor.name = f"{owner}.{name}_of_blocks"
            del tensor.dims[:]
            tensor.dims.extend(dims)
        flat = onnx.numpy_helper.from_array(np.array([rows, columns], np.int64), f"{owner}.shape")
        content.initializer.extend([point, flat])
        product = readers[node.output[0]]
        sums = readers[f"{owner}.minima"]
        total = readers[sums.output[0]]
        product.output[0] = total.output[0]
        sums.op_type = total.op_type = GONE
        nodes[at] = [
            make.make_node("Cast", [f"{owner}.{CODES}_of_blocks"], [f"{owner}.real"], to=onnx.TensorProto.FLOAT),
            make.make_node("Sub", [f"{owner}.real", point.name], [f"{owner}.centred"]),
            make.make_node("Mul", [f"{owner}.centred", f"{owner}.scales_of_blocks"], [f"{owner}.scaled"]),
            make.make_node("Reshape", [f"{owner}.scaled", flat.name], list(node.output)),
        ]
    (folder / ZERO_POINTS).write_bytes(points)
    kept = [each for node in nodes for each in (node if isinstance(node, list) else [node]) if each.op_type != GONE]
    del content.node[:]
    content.node.extend(kept)
    for tensor in [t for t in content.initializer if t.name.endswith(".minima")]:
        content.initializer.remove(tensor)


def _values(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    whole = onnx.TensorProto()
    whole.CopyFrom(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        load_external_data_for_tensor(whole, str(folder))
    return onnx.numpy_helper.to_array(whole)


def _elsewhere(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> None:
    """Say where a tensor's bytes lie."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
