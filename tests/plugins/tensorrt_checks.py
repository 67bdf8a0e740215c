"""Register the plugin with TensorRT's own Python, ask it what a build would ask, and print the answers as JSON.

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
        does = {"SUM": operator.add, "PROD": operator.mul, "CEIL_DIV": lambda x, y: -(-x // y)}
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
    sys.modules["tensorrt.plugin._tensor"].SymIntExpr._exprBuilder = Expressions()
    return trt, module


def main():
    trt, trtp = tensorrt_plugin()
    from plugins.cascade_attention import compiled
    from plugins.cascade_attention import tensorrt_plugin as ours

    ours.register(trtp, 90)
    ours.register(trtp, 90)
    registered = sys.modules["tensorrt.plugin._lib"].QDP_REGISTRY[ours.PLUGIN]
    batch, heads, kv_heads, n, capacity, d = 3, 32, 8, 48, 4096, 128

    def desc(kind, *shape):
        fixed = (heads, kv_heads, d)
        return trtp.TensorDesc(
            trtp.ShapeExprs.from_tuple(tuple(trtp.ShapeExpr(Dim(s, s in fixed)) for s in shape)), getattr(trt.DataType, kind)
        )

    q, new, past = (batch, heads, n, d), (batch, kv_heads, n, d), (batch, kv_heads, capacity, d)
    answers = {
        "inputs": registered.input_tensor_names,
        "attributes": {k: v.__name__ for k, v in registered.input_attrs.items()},
    }
    for kind in ("BF16", "HALF"):
        floats = [desc(kind, *shape) for shape in (q, new, new, past, past)]
        inputs = [*floats, desc("INT64", batch), desc("BOOL", batch, n, n)]
        made = registered.register_func(*inputs, 0.1)
        (combination,) = registered.autotune_func(*inputs, (made,))
        answers["types"], answers["tactics"] = combination.io_types, list(combination._tactics)
        for tactic in answers["tactics"]:
            name, ptx, launch, sizes = registered.aot_impl_func(*inputs, 0.1, (made,), tactic)
            value = lambda expression: expression._expr.value  # noqa: E731
            answers[f"{kind} {tactic}"] = {
                "output": [[value(e) for e in made.shape_expr], made.dtype.name],
                "name": name,
                "parameters": ptx[: ptx.index(".reqntid")].count(".param"),
                "grid": [value(launch.grid_x), value(launch.grid_y), value(launch.grid_z)],
                "threads": value(launch.block_x),
                "shared": value(launch.shared_mem),
                "sizes": [value(size) for size in sizes],
                "file": ".file" in ptx,
                **asdict(compiled.resources(compiled.Compiled(name, ptx, 0, value(launch.shared_mem)), 90)),
            }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
