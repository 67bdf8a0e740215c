"""How OpenVINO reads the project's operators: as kernels of ours (``plugins/openvino``), or in operators of its own.

Its own for attention is the paged attention that GenAI serves with. That operator's interface may change between releases, so
the release is pinned.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cpu import has
from engines.engine import GraphInfo
from engines.kept import Kept
from plugins.block_matmul.packed import Packed, pack, pack_floats
from plugins.openvino import library as libraries
from plugins.openvino.library import Library

MULTIPLIES_BYTES = ("avx512_vnni", "avx_vnni")  # OpenVINO then rounds rows to 8 bits itself


def usable(folder: Path) -> Library | None:
    """The best of a build's libraries that runs here; None, and a word about it, if they must be made again.

    With VNNI alone (no AVX-512) OpenVINO's own operators serve: nobody has measured ours there.
    """
    if has("avx_vnni") and not has(*libraries.AVX512.needs):
        return None
    instructions = next((each for each in libraries.ALL if has(*each.needs)), None)
    if instructions is None or not any(folder.glob("*.so")):  # the build has said why there are none
        return None
    file, reason = folder / libraries.name(instructions), None
    if file.exists():
        try:
            ctypes.CDLL(str(file))  # OpenVINO, which it needs, is loaded
        except OSError as error:
            reason = str(error)
    else:
        reason = f"those in {folder} are of another version"
    if reason:
        print(f"operators: {reason}; OpenVINO's own serve, at half the speed, until the build is made again here", flush=True)
        return None
    return Library(file, instructions)


def extensions(ov: Any, info: GraphInfo, precision: str, library: Library | None) -> list[Any]:
    """What to give to OpenVINO's front end.

    Args:
        library: of the project's own operators; None: OpenVINO's.
    """
    from openvino.utils.node_factory import NodeFactory

    factory = None
    if library is not None:
        factory = NodeFactory()
        factory.add_extension(library.path)
    return [attention(ov, info, factory if attends(info, precision, library) else None), block_matmul(ov, factory, library)]


def attends(info: GraphInfo, precision: str, library: Library | None) -> bool:
    """Whether attention is the project's own operator, too: it has floats, in whole registers."""
    return library is not None and precision == "f32" and info.head_dim % library.instructions.lanes == 0


def keeps(info: GraphInfo, precision: str, library: Library | None, *, rounded: bool) -> Kept:
    """What K/V are kept in. rounded: whether weights are, far more than K/V in half the memory."""
    if not rounded or not attends(info, precision, library):
        return "bf16" if precision == "bf16" else "f32"
    return "pairs" if library is not None and library.instructions == libraries.AVX512 and has("avx512_bf16") else "f16"


def attention(ov: Any, info: GraphInfo, factory: Any) -> Any:
    """``d2sd::CascadeAttention``; its inputs: ``export/paged_graph.py``.

    Args:
        factory: of the project's own operators; None: OpenVINO's paged attention.
    """
    import openvino.opset13 as op
    from openvino.frontend.onnx import ConversionExtension

    heads, kv_heads, dim = info.heads, info.kv_heads, info.head_dim

    def constant(values: Any) -> Any:
        return op.constant(np.array(values, np.int64))

    def convert(node: Any) -> list[Any]:
        q, k, v, past_k, past_v, *told = (node.get_input(i) for i in range(node.get_input_size()))
        told, mine = told[:7], told[7:]

        def rows(x: Any, width: int) -> Any:
            """``[1, H, R, D]`` to ``[R, H·D]``."""
            turned = op.transpose(x, constant([0, 2, 1, 3]))
            return op.reshape(turned, constant([-1, width * dim]), False)

        def take(x: Any, chosen: Any) -> Any:
            return op.gather(x, chosen, constant(0))

        q, k, v = rows(q, heads), rows(k, kv_heads), rows(v, kv_heads)
        if mine:
            key_rows, query_rows, out_rows = mine
            q, k, v = take(q, query_rows), take(k, key_rows), take(v, key_rows)
        scale, given = float(node.get_attribute("scale")), [q, k, v, past_k, past_v]
        if factory is not None:
            lens, begins, blocks, block_begins, _longest, bias, bias_begins = told
            about = {"heads": heads, "kv_heads": kv_heads, "scale": scale}
            out = factory.create("CascadeAttention", [*given, lens, begins, blocks, block_begins, bias, bias_begins], about)
        else:
            out = _paged_attention(ov, info, given, told, scale)
        out = out.output(0)
        if mine:
            out = take(out, out_rows)
        out = op.reshape(out, constant([1, -1, heads, dim]), False)
        return [op.transpose(out, constant([0, 2, 1, 3])).output(0)]

    return ConversionExtension("CascadeAttention", "d2sd", convert)


def _paged_attention(ov: Any, info: GraphInfo, given: Sequence[Any], told: Sequence[Any], scale: float) -> Any:
    """OpenVINO's own."""
    import openvino.opset13 as op
    from openvino.op import _PagedAttentionExtension

    integer, real = np.int32, np.float32

    def constant(values: Any, dtype: type[np.generic]) -> Any:
        return op.constant(np.array(values, dtype))

    def none(dtype: type[np.generic], rank: int = 1) -> Any:
        return op.constant(np.zeros([0] * rank, dtype))

    lens, begins, blocks, block_begins, longest, bias, bias_begins = told
    inputs = [
        *(*given, lens, begins, blocks, block_begins),
        *(constant(scale, real), constant(0, integer), none(real), longest),  # scale, window, ALiBi
        *(none(integer), none(integer), none(integer), none(real)),  # score aggregation, rotation of blocks
        *(none(real), constant(0, integer), constant(0, integer)),  # XAttention
        *(none(real, 4), constant(0, integer), none(integer), none(integer), none(integer)),  # sinks, eviction
        *(none(integer), bias, bias_begins),  # token types, the tree's mask
    ]
    made = _PagedAttentionExtension([x if isinstance(x, ov.Output) else x.output(0) for x in inputs])
    for kind in "kv":
        made.get_rt_info()[f"num_{kind}_heads"] = info.kv_heads
        made.get_rt_info()[f"{kind}_head_size"] = info.head_dim
    return made


def block_matmul(ov: Any, factory: Any, library: Library | None) -> Any:
    """``d2sd::BlockMatMul``.

    Args:
        factory, library: of the project's own operators; None: OpenVINO's.
    """
    import openvino.opset13 as op
    from openvino.frontend.onnx import ConversionExtension

    def convert(node: Any) -> list[Any]:
        x, *tensors = (node.get_input(i) for i in range(node.get_input_size()))
        given = iter(tensors)
        matrices = [[next(given) for _ in range(count)] for count in node.get_attribute("tensors")]
        lanes = library and library.instructions.lanes
        packed = [_packed(ov, lanes, *matrix) if lanes else None for matrix in matrices]
        forms = {(each.bits, each.block, each.half) if each else None for each in packed}
        if len(forms) == 1 and None not in forms:
            return _in_one(op, factory, x, packed)
        return [
            _in_one(op, factory, x, [own])[0] if own else _in_own_operators(op, x, *matrix)
            for own, matrix in zip(packed, matrices, strict=True)
        ]

    return ConversionExtension("BlockMatMul", "d2sd", convert)


def _packed(ov: Any, lanes: int, codes: Any, *numbers: Any) -> Packed | None:
    if not numbers:
        maker = codes.get_node()
        turned = maker.get_type_name() == "Transpose"
        values = (maker.input_value(0).get_node() if turned else maker).data
        return pack_floats(values.T if turned else values, lanes=lanes)
    bits = 4 if codes.get_element_type() == ov.Type.i4 else 8
    return pack(_codes(ov, codes), *(each.get_node().data for each in numbers), bits=bits, lanes=lanes)


def _in_one(op: Any, factory: Any, x: Any, matrices: Sequence[Any]) -> list[Any]:
    """The project's operator over matrices of one form: their products."""
    one = matrices[0]
    about = {"columns": [each.columns for each in matrices], "bits": one.bits, "block": one.block, "half": one.half}
    return factory.create("BlockMatMul", [x, *(op.constant(each.data) for each in matrices)], about).outputs()


def _codes(ov: Any, constant: Any) -> NDArray[np.int8]:
    """``[K, N]`` of a constant, whose 4-bit numbers lie two in a byte."""
    data = constant.get_node().data
    if constant.get_element_type() == ov.Type.i4:
        data = np.stack([data << 4 >> 4, data >> 4], axis=-1)
    return data.reshape(list(constant.get_shape()))


def _in_own_operators(op: Any, x: Any, codes: Any, scales: Any = None, minima: Any = None) -> Any:
    """A product that OpenVINO computes on the codes as they lie. Without scales they are floats.

    Minima are a second, small product where the CPU multiplies 8-bit numbers. Elsewhere codes are unfolded anyway, and
    minima become zero points of theirs, ``x·(s·(q + m / s))``: exact, and one product less.
    """
    if scales is None:
        return op.matmul(x, codes, False, False).output(0)
    depth, columns = codes.get_shape()
    groups = scales.get_shape()[0]
    size = depth // groups

    def constant(values: Any, dtype: type[np.generic] = np.int64) -> Any:
        return op.constant(np.array(values, dtype))

    def blocks(matrix: Any, rows: int) -> Any:
        return op.reshape(matrix, constant([groups, rows, columns]), False)

    real = op.convert(blocks(codes, size), "f32")
    if minima is not None and not any(map(has, MULTIPLIES_BYTES)):
        values, factors = minima.get_node().data, scales.get_node().data
        zero = np.divide(-values, factors, out=np.zeros_like(values), where=factors != 0)
        real = op.subtract(real, op.constant(zero[:, None]))
    weights = op.reshape(op.multiply(real, blocks(scales, 1)), constant([depth, columns]), False)
    product = op.matmul(x, weights, False, False)
    if minima is None or not any(map(has, MULTIPLIES_BYTES)):
        return product.output(0)
    sums = op.reduce_sum(op.reshape(x, constant([0, 0, groups, size]), True), constant([-1]))
    return op.add(product, op.matmul(sums, minima, False, False)).output(0)
