"""ONNX Runtime's providers where they are installed but cannot run; what runs: ``test_conformance.py``."""

import ctypes

import onnx
import onnxruntime as ort
import pytest

from engines import onnxruntime
from engines.engine import EngineError, GraphInfo


def test_cuda_without_a_driver_is_not_there(monkeypatch):
    """ONNX Runtime's CUDA build names the provider on every machine."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnxruntime.CUDA, onnxruntime.CPU])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert onnxruntime.choose(["cuda", "cpu"]) == "cpu"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    assert onnxruntime.choose(["cuda", "cpu"]) == "cuda"


def test_no_provider_that_is_there(monkeypatch):
    monkeypatch.setattr(onnxruntime, "available", lambda provider: provider == "cpu")
    assert onnxruntime.choose(["cuda", "cpu"]) == "cpu"
    with pytest.raises(EngineError, match="none of cuda is installed here"):
        onnxruntime.choose(["cuda"])


@pytest.mark.skipif(onnxruntime.CUDA in ort.get_available_providers(), reason="the CUDA provider is installed")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_cuda_provider_that_does_not_load_is_refused(tmp_path):
    """ONNX Runtime itself would go on, silently, on the CPU."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["B"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    info = GraphInfo(layers=1, kv_heads=1, head_dim=8, feature_width=4, vocabulary=7)
    with pytest.raises(EngineError, match="cuda is installed, but its libraries do not load"):
        onnxruntime.OnnxRuntimeEngine(path, info, "cuda")
