"""The runtimes that are present here, each with the engines of a tiny pipeline. A further runtime is a line of ``RUNTIMES``."""

from functools import partial

import pytest
import torch

from engines import onnxruntime
from engines.build_directory import BuildDirectory
from engines.dense import Drafter, Target
from engines.engine import GraphInfo
from engines.kv_cache import KVCache
from engines.tensorrt import TensorRTEngine
from export.build import build
from export.config import load
from export.tensorrt_build import profiles
from tests import tiny
from tests.engines import tensorrt_double


def built(file, **engine):
    """A pipeline's build for a backend."""
    pipeline = load(file)
    folder = file.parent / engine["backend"]
    build(pipeline.model_copy(update={"engine": pipeline.engine.model_copy(update=engine)}), folder)
    return BuildDirectory.open(folder)


def loaded(file, **engine):
    return built(file, **engine).load()


class HostWritten(TensorRTEngine):
    """Without the kernel that writes the cache, which crawls in the interpreter; ``test_cache_write.py`` compares the two."""

    cache = KVCache


def doubled(file):
    """Our TensorRT runtime over a build for ONNX Runtime, TensorRT itself stood in for."""
    directory, engines = built(file, backend="onnxruntime"), []
    for graph, recorded in directory.manifest["graphs"].items():
        folder = directory.path / "engines" / graph
        shapes = profiles(graph, block_size=6, branches=3, sequences=3, length=512)
        record = tensorrt_double.compile_engine(folder / "model.onnx", folder / "model.engine", shapes)
        info = GraphInfo(**recorded["info"])
        engines.append(HostWritten(folder / "model.engine", info, record, tensorrt_double, "cpu"))
    target, first, second = engines
    return Target(target), Drafter(first), Drafter(second)


RUNTIMES = {
    "openvino": partial(loaded, backend="openvino"),
    "onnxruntime-cpu": partial(loaded, backend="onnxruntime", providers=["cpu"]),
    "tensorrt-double": doubled,
}
if onnxruntime.available("cuda"):
    RUNTIMES["onnxruntime-cuda"] = partial(loaded, backend="onnxruntime", providers=["cuda"])
if torch.cuda.is_available():
    RUNTIMES["tensorrt_rtx"] = partial(loaded, backend="tensorrt_rtx")


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def pipeline(request, tmp_path_factory):
    """A tiny pipeline's file, and transformers' own form of its target."""
    return tiny.save_pipeline(tmp_path_factory.mktemp(request.param), request.param), tiny.target(request.param)


@pytest.fixture(scope="session", params=RUNTIMES)
def served(request, pipeline):
    """Transformers' target, and the engines."""
    file, model = pipeline
    return model, RUNTIMES[request.param](file)
