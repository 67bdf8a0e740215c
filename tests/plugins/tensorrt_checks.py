"""Register the plugins with TensorRT's own Python, ask them what a build would ask, and print the answers as JSON.

Real: ``tensorrt.plugin`` of the wheel ``tensorrt-cu13-bindings``, whose checks are Python, and the kernel compiled to PTX.
TensorRT's libraries, which are not needed for that, are stood in for by the enumerations of TensorRT-RTX and by empty classes;
symbolic expressions are evaluated at once. Not imported by tests: a process of its own, without Triton's interpreter.
"""

import importlib.metadata
import importlib.util
import json
import operator
import sys
import types
from dataclasses import asdict

import tensorrt_rtx_bindings as rtx


class Dim:
    """``IDimensionExpr``: an extent, fixed by the graph or not; its value is known here all the same."""

    def __init__(self, value, fixed):
        self.value, self.fixed = value, fixed

    def is_constant(self):
        return self.fixed

    def get_constant_value(self):
        assert self.fixed, "a dynamic extent has no value while an engine is built"
        return self.value


class Expressions:
    """``IExprBuilder``."""

    def constant(self, value):
        return Dim(value, True)

    def operation(self, kind, a, b):
        does = {"SUM": operator.add, "PROD": operator.mul, "FLOOR_DIV": operator.floordiv, "MAX": max, "MIN": min}
        does["CEIL_DIV"] = lambda x, y: -(-x // y)
        return Dim(does[kind.name](a.value, b.value), a.fixed and b.fixed)


class Stand(types.ModuleType):
    """The module ``tensorrt`` as far as its plugin package looks into it."""

    def __getattr__(self, name):
        if name.startswith("__") or (found := getattr(rtx, name, None)) is None:
            if name.startswith("__"):
                raise AttributeError(name)
            found = type(name, (), {"INT": 0, "INT32": 2})
        setattr(self, name, found)
        return found


def tensorrt_plugin():
    """TensorRT's ``tensorrt.plugin``."""
    trt = Stand("tensorrt")
    trt.IDimensionExpr = Dim
    trt.IPluginCreatorV3Quick = type("IPluginCreatorV3Quick", (), {})
    trt.PluginField = trt.PluginFieldCollection = lambda *fields: fields
    registry = types.SimpleNamespace(register_creator=lambda *_: True, get_creator=lambda *_: None)
    trt.get_plugin_registry = lambda: registry
    files = importlib.metadata.files("tensorrt-cu13-bindings")
    package = next(f for f in files if f.parts[-2:] == ("plugin", "__init__.py")).locate()
    spec = importlib.util.spec_from_file_location("tensorrt.plugin", package, submodule_search_locations=[str(package.parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {"tensorrt": trt, "tensorrt.plugin": module}
    trt.plugin = module
    spec.loader.exec_module(module)
    return trt, module


BATCH, HEADS, KV_HEADS, NODES, CAPACITY, SIZE = 3, 32, 8, 48, 4096, 128
SHAPES = {
    "q": (BATCH, HEADS, NODES, SIZE),
    **dict.fromkeys(("k_new", "v_new"), (BATCH, KV_HEADS, NODES, SIZE)),
    **dict.fromkeys(("past_k", "past_v"), (BATCH, KV_HEADS, CAPACITY, SIZE)),
    "past_lengths": (BATCH,),
    "mask": (BATCH, NODES, NODES),
}


def main():
    trt, trtp = tensorrt_plugin()
    from plugins.cascade_attention import compiled
    from plugins.cascade_attention import tensorrt_plugin as ours

    ours.register(90)
    ours.register(90)
    registry = sys.modules["tensorrt.plugin._lib"].QDP_REGISTRY
    expressions = sys.modules["tensorrt.plugin._tensor"]
    expressions.SymIntExpr._exprBuilder = Expressions()
    value = lambda expression: expression._expr.value  # noqa: E731

    def desc(kind, *shape):
        extents = (trtp.ShapeExpr(Dim(s, s in (HEADS, KV_HEADS, SIZE))) for s in shape)
        return trtp.TensorDesc(trtp.ShapeExprs.from_tuple(tuple(extents)), getattr(trt.DataType, kind))

    def unshaped(given):
        """As TensorRT gives it when it asks for the outputs' types."""
        fake = trtp.TensorDesc()
        fake.dtype, fake.shape_expr = given.dtype, trtp.ShapeExprs(len(given.shape_expr), _is_dummy=True)
        return fake

    def output_types(plugin, inputs, attributes):
        expressions.SymIntExpr._exprBuilder = None
        made = several(plugin.register_func(*map(unshaped, inputs), **attributes))
        expressions.SymIntExpr._exprBuilder = Expressions()
        return [d.dtype.name for d in made]

    def several(made):
        return made if isinstance(made, tuple) else (made,)

    def ask(name, inputs, **attributes):
        """What a plugin answers, by tactic; and its output tensors."""
        plugin = registry[name]
        made = several(plugin.register_func(*inputs, **attributes))
        (combination,) = plugin.autotune_func(*inputs, made)
        told = {
            "inputs": plugin.input_tensor_names,
            "attributes": {k: v.__name__ for k, v in plugin.input_attrs.items()},
            "types": combination.io_types,
            "outputs": [[[value(e) for e in d.shape_expr], d.dtype.name] for d in made],
            "output_types": output_types(plugin, inputs, attributes),
            "tactics": [],
        }
        for tactic in combination._tactics:
            name, ptx, launch, sizes = plugin.aot_impl_func(*inputs, *attributes.values(), made, tactic)
            shared = value(launch.shared_mem)
            taken = compiled.resources(compiled.Compiled(name, ptx, 0, shared), 90)
            told["tactics"].append(
                {
                    "name": name,
                    "parameters": ptx[: ptx.index(".reqntid")].count(".param"),
                    "grid": [value(launch.grid_x), value(launch.grid_y), value(launch.grid_z)],
                    "threads": value(launch.block_x),
                    "sizes": [value(size) for size in sizes],
                    "file": ".file" in ptx,
                    **asdict(taken),
                }
            )
        return told, made

    answers = {}
    for kind, code in (("BF16", 16), ("HALF", 10)):
        types = dict.fromkeys(SHAPES, kind) | {"past_lengths": "INT64", "mask": "BOOL"}
        inputs = [desc(types[name], *shape) for name, shape in SHAPES.items()]
        whole, _ = ask("d2sd::CascadeAttention", inputs, scale=0.1)
        states, made = ask("d2sd::CascadeStates", inputs, scale=0.1)
        merge, _ = ask("d2sd::CascadeMerge", made, to=code)
        answers[kind] = {"whole": whole, "states": states, "merge": merge}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
