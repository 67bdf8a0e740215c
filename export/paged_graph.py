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

What leaves the operator for a row that sees none of the call's rows, nobody reads.

``past_lengths``, ``mask`` and the ``new_*`` outputs are gone.

Products of one x with matrices in blocks, or of floats, are one node, ``d2sd::BlockMatMul`` (``plugins/block_matmul``), minima
included.
"""

from pathlib import Path

import onnx

from plugins.cascade_attention.function_body import DOMAIN, CascadeAttention

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
TARGET = {"asked": (INT64, ["asked"])}
Products = dict[str, list[tuple[list[str], str]]]  # of an x: a matrix's tensors, and what the product is called


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
    _join_blocks(content)
    _join_floats(content)
    inputs = [value for value in content.input if value.name not in ("mask", "past_lengths")]
    outputs = [value for value in content.output if not value.name.startswith("new_")]
    del content.input[:], content.output[:], content.value_info[:], model.functions[:]
    content.input.extend([*inputs, *(onnx.helper.make_tensor_value_info(name, *kind) for name, kind in told.items())])
    content.output.extend(outputs)
    onnx.save(model, place)


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


def _join_blocks(content: onnx.GraphProto) -> None:
    """``x·(s·q)``, and ``sums(x)·m`` where there are minima, of all matrices that the same x meets, become one node."""
    readers = {name: node for node in content.node for name in node.input}
    products: Products = {}
    for node in content.node:
        if node.op_type != "DequantizeLinear":
            continue
        last, matrix = readers[node.output[0]], list(node.input)
        x = last.input[0]
        sums = readers.get(f"{node.input[1].removesuffix('.scales')}.minima")
        if sums is not None:
            matrix.append(sums.input[1])
            last = readers[sums.output[0]]
        products.setdefault(x, []).append((matrix, last.output[0]))
    _join(content, products)


def _join_floats(content: onnx.GraphProto) -> None:
    """``x·W`` of all matrices of floats that the same x meets become one node."""
    matrices = {each.name for each in content.initializer}
    matrices |= {node.output[0] for node in content.node if node.op_type == "Transpose" and node.input[0] in matrices}
    products: Products = {}
    for node in content.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            products.setdefault(node.input[0], []).append(([node.input[1]], node.output[0]))
    _join(content, products)


def _join(content: onnx.GraphProto, products: Products) -> None:
    """A node for each x in place of its products, and of what only they needed."""
    nodes = list(content.node)
    for x, found in products.items():
        names = [name for _, name in found]
        inputs = [x, *(tensor for matrix, _ in found for tensor in matrix)]
        tensors = [len(matrix) for matrix, _ in found]
        at = next(i for i, node in enumerate(nodes) if node.output[0] in names)
        nodes = [node for node in nodes if node.output[0] not in names]
        nodes.insert(at, onnx.helper.make_node("BlockMatMul", inputs, names, domain=DOMAIN, tensors=tensors))
    wanted = {value.name for value in content.output}
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    del content.node[:]
    content.node.extend(reversed(kept))
