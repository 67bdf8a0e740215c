"""How OpenVINO reads ``d2sd::BlockMatMul``: as the project's own operator, or in operators of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cpu import has
from plugins.block_matmul.packed import Packed, pack

WIDE = ("avx512_vnni", "avx_vnni")  # the CPU multiplies 8-bit numbers: OpenVINO then rounds rows itself, and is fast
KERNEL = ("avx2", "fma", "f16c")  # what kernel.hpp needs


def usable(library: Path) -> bool:
    """Whether the project's own operator is there, and is the faster one here."""
    return library.exists() and has(*KERNEL) and not any(map(has, WIDE))


def extension(ov: Any, library: Path | None) -> Any:
    """What to give to OpenVINO's front end.

    Args:
        library: of the project's own operator; None: OpenVINO's.
    """
    import openvino.opset13 as op
    from openvino.frontend.onnx import ConversionExtension
    from openvino.utils.node_factory import NodeFactory

    factory = None
    if library is not None:
        factory = NodeFactory()
        factory.add_extension(library)

    def convert(node: Any) -> list[Any]:
        x, *tensors = (node.get_input(i) for i in range(node.get_input_size()))
        given = iter(tensors)
        matrices = [[next(given) for _ in range(2 + has)] for has in node.get_attribute("has_minima")]
        if factory is not None:
            packed = [_packed(ov, *matrix) for matrix in matrices]
            forms = {(each.bits, each.block, each.half) if each else None for each in packed}
            if len(forms) == 1 and None not in forms:
                return _in_one(op, factory, x, packed)
            return [
                _in_one(op, factory, x, [own])[0] if own else _in_own_operators(op, x, *matrix)
                for own, matrix in zip(packed, matrices, strict=True)
            ]
        return [_in_own_operators(op, x, *matrix) for matrix in matrices]

    return ConversionExtension("BlockMatMul", "d2sd", convert)


def _packed(ov: Any, codes: Any, *numbers: Any) -> Packed | None:
    bits = 4 if codes.get_element_type() == ov.Type.i4 else 8
    return pack(_codes(ov, codes), *(each.get_node().data for each in numbers), bits=bits)


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


def _in_own_operators(op: Any, x: Any, codes: Any, scales: Any, minima: Any = None) -> Any:
    """A product that OpenVINO computes on the codes as they lie.

    Minima are a second, small product where the CPU multiplies 8-bit numbers. Elsewhere codes are unfolded anyway, and
    minima become zero points of theirs, ``x·(s·(q + m / s))``: exact, and one product less.
    """
    depth, columns = codes.get_shape()
    groups = scales.get_shape()[0]
    size = depth // groups

    def constant(values: Any, dtype: type[np.generic] = np.int64) -> Any:
        return op.constant(np.array(values, dtype))

    def blocks(matrix: Any, rows: int) -> Any:
        return op.reshape(matrix, constant([groups, rows, columns]), False)

    real = op.convert(blocks(codes, size), "f32")
    if minima is not None and not any(map(has, WIDE)):
        values, factors = minima.get_node().data, scales.get_node().data
        zero = np.divide(-values, factors, out=np.zeros_like(values), where=factors != 0)
        real = op.subtract(real, op.constant(zero[:, None]))
    weights = op.reshape(op.multiply(real, blocks(scales, 1)), constant([depth, columns]), False)
    product = op.matmul(x, weights, False, False)
    if minima is None or not any(map(has, WIDE)):
        return product.output(0)
    sums = op.reduce_sum(op.reshape(x, constant([0, 0, groups, size]), True), constant([-1]))
    return op.add(product, op.matmul(sums, minima, False, False)).output(0)
