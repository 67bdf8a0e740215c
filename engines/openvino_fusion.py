"""What stands beside our operators in OpenVINO's graph becomes part of them: a pass has hundreds of nodes, and each takes
microseconds even if it computes next to nothing.

Of a product: a norm in front of it (RMSNorm), the gate of an MLP (SwiGLU), and what it is added to. Of attention: that queries
and keys are turned by their positions (RoPE).
"""

from typing import Any

import numpy as np

from plugins.openvino.library import Library

Attributes = dict[str, Any]
Values = dict[Any, Any]  # of a pattern's nodes


def fuse(model: Any, library: Library) -> None:
    """Fuse in place. library: of the project's operators."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(library.path)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "BlockMatMul":
            _fuse_product(node, factory)
        elif node.get_type_name() == "CascadeAttention":
            _fuse_attention(node, factory)


def _fuse_product(node: Any, factory: Any) -> None:
    x, *matrices = node.input_values()
    inputs, made_of = _normed(x) or _gated(x) or ([x], {})
    outputs, before = node.outputs(), []
    if len(outputs) == 1 and len(users := list(outputs[0].get_target_inputs())) == 1:
        user = users[0].get_node()
        others = [value for value in user.input_values() if value != outputs[0]]
        alike = [value.get_partial_shape() == outputs[0].get_partial_shape() for value in others] == [True]
        if user.get_type_name() == "Add" and alike:  # a bias is none
            outputs, before = [user.output(0)], others
    if made_of or before:
        about = _attributes(node, "columns", "bits", "block", "half") | made_of | {"adds": bool(before)}
        made = factory.create("BlockMatMul", [*inputs, *matrices, *before], about)
        for old, new in zip(outputs, made.outputs(), strict=True):
            old.replace(new)


def _fuse_attention(node: Any, factory: Any) -> None:
    import openvino.opset13 as op

    q, k, *others = node.input_values()
    queries, keys = _turned(q), _turned(k)
    if queries is None or keys is None or queries[1:] != keys[1:]:
        return
    rows = []
    for (heads, _, _), value in ((queries, q), (keys, k)):
        width = value.get_partial_shape()[1].get_length()
        rows.append(op.reshape(heads, op.constant(np.array([-1, width])), False))
    about = _attributes(node, "heads", "kv_heads", "scale") | {"turns": True}
    node.output(0).replace(factory.create("CascadeAttention", [*rows, *others, *queries[1:]], about).output(0))


def _turned(value: Any) -> tuple[Any, Any, Any] | None:
    """Rows of ``x · cos + (-second half, first half) · sin``, ``[1, H, R, D]``: x as ``[1, R, H, D]``, cos and sin."""
    x, cos, sin, begin, end = (_any() for _ in range(5))
    heads = _op("Transpose", x, _any())
    second = _op("Slice", heads, begin, _any(), _any(), _any())
    first = _op("Slice", heads, _any(), end, _any(), _any())
    turned = _op("Multiply", _op("Concat", _op("Negative", second), first), sin)
    rows = _op("Reshape", _op("Transpose", _op("Add", _op("Multiply", heads, cos), turned), _any()), _any())
    found = _match(rows, value)
    if found is None or {_number(found[begin]), _number(found[end])} != {found[x].get_partial_shape()[3].get_length() // 2}:
        return None
    return found[x], found[cos], found[sin]


def _normed(value: Any) -> tuple[list[Any], Attributes] | None:
    """``x / sqrt(mean(x²) + epsilon) · norm``: x and norm, and epsilon."""
    x, power, axis, norm, epsilon = _any(), _any(), _any(), _op("Constant"), _op("Constant")
    mean = _op("ReduceMean", _op("Power", x, power), axis)
    root = _op("Sqrt", _op("Add", mean, epsilon))
    found = _match(_op("Multiply", norm, _op("Multiply", x, _op("Divide", _any(), root))), value)
    if found is None or _number(found[power]) != 2 or _number(found[axis]) != -1:
        return None
    return [found[x], found[norm]], {"of": "norm", "epsilon": _number(found[epsilon])}


def _gated(value: Any) -> tuple[list[Any], Attributes] | None:
    """``gate · sigmoid(gate) · x``: x and gate."""
    x, gate = _any(), _any()
    found = _match(_op("Multiply", _op("Multiply", gate, _op("Sigmoid", gate)), x), value)
    return None if found is None else ([found[x], found[gate]], {"of": "gate"})


def _op(kind: str, *inputs: Any) -> Any:
    """A pattern: an operator of OpenVINO's."""
    from openvino.passes import WrapType

    return WrapType(f"opset13.{kind}", list(inputs)) if inputs else WrapType(f"opset13.{kind}")


def _any() -> Any:
    """A pattern: anything."""
    from openvino.passes import AnyInput

    return AnyInput()


def _match(pattern: Any, value: Any) -> Values | None:
    from openvino.passes import Matcher

    matcher = Matcher(pattern, "")
    return matcher.get_pattern_value_map() if matcher.match(value) else None


def _number(value: Any) -> float | None:
    """Of a constant of one number."""
    node = value.get_node()
    return float(node.data.item()) if node.get_type_name() == "Constant" and node.data.size == 1 else None


def _attributes(node: Any, *names: str) -> Attributes:
    given = node.get_attributes()
    return {name: given[name] for name in names}
