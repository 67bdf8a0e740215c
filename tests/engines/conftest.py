"""The runtimes that are present here, each with the engines of a tiny pipeline. A further runtime is a line of ``RUNTIMES``."""

import os
from functools import partial

import pytest
import torch

from engines import onnxruntime
from engines.build_directory import BuildDirectory
from engines.dense import Drafter, Target
from engines.engine import GraphInfo
from engines.kv_cache import KVCache
from engines.tensorrt import TensorRTEngine
from export.tensorrt_build import profiles
from tests import shared, tiny
from tests.engines import tensorrt_double


def built(file, **engine):
    """A pipeline's build for a backend."""
    return BuildDirectory.open(shared.built(file, **engine))


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
        engine = folder / f"{os.getpid()}.engine"  # the folder is other workers', too
        record = tensorrt_double.compile_engine(folder / "model.onnx", engine, shapes)
        info = GraphInfo(**recorded["info"])
        engines.append(HostWritten(engine, info, record, tensorrt_double, "cpu"))
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
# The double runs ONNX Runtime's build, which has its own turn; what is ours in it knows no architecture.
PAIRS = [(a, r) for a in ("llama", "qwen3") for r in RUNTIMES if (a, r) != ("qwen3", "tensorrt-double")]


@pytest.fixture(scope="session", params=PAIRS, ids="-".join)
def pair(request):
    """An architecture and a runtime."""
    return request.param


@pytest.fixture(scope="session")
def pipeline(pair, tmp_path_factory):
    """A tiny pipeline's file, and transformers' own form of its target."""
    return shared.pipeline(tmp_path_factory, pair[0]), tiny.target(pair[0])


@pytest.fixture(scope="session")
def served(pair, pipeline):
    """Transformers' target, and the engines."""
    file, model = pipeline
    return model, RUNTIMES[pair[1]](file)
