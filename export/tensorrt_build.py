"""An ONNX graph → a TensorRT engine, through the API that TensorRT and TensorRT-RTX share.

TensorRT takes ``d2sd::CascadeAttention`` by its plugins; TensorRT-RTX, which has no plugins, inlines the function body.
Networks are strongly typed: an engine computes in the types of its graph.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from engines import tensorrt_library
from engines.dense import LONGEST, SIZES, padded
from engines.engine import EngineError
from engines.kv_cache import SMALLEST, capacity_for
from export.config import UserError

Range = tuple[int, int, int]  # least, most common, most
Profiles = dict[str, dict[str, Range]]


class TensorRTError(UserError):
    """An engine cannot be built; the message says why and what to do."""


def library(backend: str) -> ModuleType:
    """The backend's Python module.

    Raises:
        TensorRTError: it is not installed; says what to install.
    """
    try:
        return tensorrt_library.library(backend)
    except EngineError as error:
        raise TensorRTError(str(error)) from None


def device(backend: str) -> str | None:
    """The GPU that an engine is built for; None where engines run on any."""
    import torch  # takes seconds, which --help need not wait for

    return torch.cuda.get_device_name() if backend == "tensorrt" and torch.cuda.is_available() else None


def profiles(graph: str, block_size: int, branches: int, sequences: int, length: int) -> Profiles:
    """The shapes that an engine is tuned for and accepts: what the models in ``engines/dense.py`` can ask for.

    Args:
        graph: target, first or second. block_size: γ. branches: K. sequences: B at most. length: of a sequence, at most.

    Returns:
        For each profile, the range of each axis of the graph's bindings.
    """
    batch = (1, 1, sequences)
    capacity = (SMALLEST, max(SMALLEST, min(1024, capacity_for(length))), capacity_for(length))
    piece = (1, SIZES[-1], LONGEST)
    if graph == "target":
        nodes = padded(1 + (branches + 1) * (block_size - 1))
        calls: Profiles = {"decode": {"N": (1, 1, 1)}, "verify": {"N": (1, nodes, nodes)}, "prefill": {"N": piece}}
        for axes in calls.values():
            axes["T"] = axes["N"]
    else:
        block, redraft, committed = padded(block_size), padded(branches * block_size), (1, 4, padded(block_size))
        calls = {
            "draft": {"N": (1, block, block), "M": committed},
            "redraft": {"N": (1, redraft, redraft), "M": committed},
            "catch_up": {"N": (1, block, max(block, redraft)), "M": piece},
        }
        for axes in calls.values():
            axes["T"] = tuple(m + n for m, n in zip(axes["M"], axes["N"], strict=True))  # type: ignore[assignment]
    return {name: {"B": batch, "C": capacity, **axes} for name, axes in calls.items()}


def build_engine(backend: str, graph: Path, engine: Path, shapes: Profiles, cache: Path) -> dict[str, Any]:
    """Build ``engine`` from the ONNX file ``graph``.

    Args:
        shapes: as ``profiles`` gives them. cache: file of the timing cache, read if there and written.

    Returns:
        What the build records of the engine: the library's name and version, the profiles, and each binding's mode, dtype and
        shape, named axes by their names.

    Raises:
        TensorRTError: the library is missing, refuses the graph, or cannot build it.
    """
    trt = library(backend)
    logger = _logger(trt)
    if backend == "tensorrt":
        from plugins.cascade_attention import tensorrt_plugin

        tensorrt_plugin.register()
        graph = split(graph, shapes)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if backend == "tensorrt":
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
        raise TensorRTError(f"{backend} {trt.__version__} cannot read {graph.name}: {reasons or logger.last}")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    dims = _dims(graph)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # f32 is f32: answers do not change
    for axes in shapes.values():
        profile = builder.create_optimization_profile()
        for value in inputs:
            ranges = [axes[dim] if isinstance(dim, str) else (dim,) * 3 for dim in dims[value.name]]
            profile.set_shape(value.name, *zip(*ranges, strict=True))
        config.add_optimization_profile(profile)
    if backend == "tensorrt":  # TensorRT-RTX times kernels where the engine runs
        timings = config.create_timing_cache(cache.read_bytes() if cache.exists() else b"")
        config.set_timing_cache(timings, ignore_mismatch=True)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise TensorRTError(f"{backend} {trt.__version__} cannot build {graph.name}: {logger.last}")
    engine.write_bytes(memoryview(serialized))
    if backend == "tensorrt":
        cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return {
        "library": backend,
        "version": trt.__version__,
        "profiles": shapes,
        "bindings": {
            value.name: {"mode": mode, "dtype": value.dtype.name, "shape": dims[value.name]}
            for mode, values in (("input", inputs), ("output", outputs))
            for value in values
        },
    }


def split(graph: Path, shapes: Profiles) -> Path:
    """Cut the prefix in every attention of a graph (``plugins/cascade_attention/split.py``), unless decoding all sequences at
    once fills a GPU as it is. Returns the file to be parsed."""
    from plugins.cascade_attention import kernel
    from plugins.cascade_attention.split import split_nodes

    model = onnx.load(graph, load_external_data=False)
    cache = next(value.type.tensor_type for value in model.graph.input if value.name == "past_k_0")
    kv_heads = cache.shape.dim[1].dim_value
    batch, capacity = (max(axes[axis][2] for axes in shapes.values()) for axis in "BC")
    if kernel.stretches(batch, kv_heads, 1, capacity) == 1:
        return graph
    split_nodes(model, cache.elem_type)
    parsed = graph.with_name(f"split-{graph.name}")
    onnx.save(model, parsed)
    return parsed


def _dims(graph: Path) -> dict[str, list[int | str]]:
    """The shape of each binding of an ONNX file, dynamic axes by their names."""
    content = onnx.load(graph, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*content.input, *content.output)
    }


def _logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Keeps the last error, which the library does not put into what it raises."""

        def __init__(self) -> None:
            super().__init__()
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = message

    return Logger()
