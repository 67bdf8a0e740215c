"""Graphs with our operators, before and after fusing: they compute the same, and what only looks alike is left alone."""

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
from openvino.utils.node_factory import NodeFactory

from engines import cpu
from engines.openvino_fusion import fuse
from engines.openvino_operators import _in_one
from export.checkpoints import cache_directory
from plugins.block_matmul.packed import pack_floats
from plugins.openvino import library

DEPTH, WIDE, EPSILON = 64, 96, 0.5


@pytest.fixture(scope="module")
def own():
    """A library, and what makes nodes of it."""
    made = [each for each in library.compiled(cache_directory() / "operators") if cpu.has(*each.instructions.needs)]
    if not made:
        pytest.skip("the kernels are for CPUs with AVX2")
    factory = NodeFactory()
    factory.add_extension(made[0].path)
    return made[0], factory


def layer(own, power=2.0, joined=op.add):
    """An MLP behind a norm, with ``joined`` at its end."""
    used, factory = own
    rng = np.random.default_rng(0)

    def product(x, *shapes):
        matrices = [pack_floats(rng.normal(size=shape).astype(np.float32), lanes=used.instructions.lanes) for shape in shapes]
        return _in_one(op, factory, x, matrices)

    x = op.parameter([1, -1, DEPTH], np.float32)
    squares = op.reduce_mean(op.power(x, np.float32(power)), np.array([-1]), True)
    scale = op.divide(np.float32(1), op.sqrt(op.add(squares, np.float32(EPSILON))))
    normed = op.multiply(op.constant(rng.normal(size=DEPTH).astype(np.float32)), op.multiply(x, scale))
    gate, up = product(normed, (DEPTH, WIDE), (DEPTH, WIDE))
    (down,) = product(op.multiply(op.multiply(gate, op.sigmoid(gate)), up), (WIDE, DEPTH))
    return ov.Model([joined(x, down)], [x])


def kinds(model):
    return [
        (given["of"], given["adds"])
        for node in model.get_ordered_ops()
        if node.get_type_name() == "BlockMatMul" and (given := node.get_attributes())
    ]


def run(model, x):
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]


def test_a_layer(own):
    model, x = layer(own), np.random.default_rng(1).normal(size=(1, 5, DEPTH)).astype(np.float32)
    assert kinds(model) == [("x", False), ("x", False)]
    before = run(model, x)
    fuse(model, own[0])
    assert kinds(model) == [("norm", False), ("gate", True)]
    np.testing.assert_allclose(run(model, x), before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("changed", "left"),
    [({"power": 4.0}, [("x", False), ("gate", True)]), ({"joined": op.subtract}, [("norm", False), ("gate", False)])],
)
def test_what_looks_alike_is_left_alone(own, changed, left):
    model, x = layer(own, **changed), np.random.default_rng(1).normal(size=(1, 5, DEPTH)).astype(np.float32)
    before = run(model, x)
    fuse(model, own[0])
    assert kinds(model) == left
    np.testing.assert_allclose(run(model, x), before, atol=1e-5 * np.abs(before).max())
