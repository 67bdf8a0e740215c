"""ONNX Runtime's providers where they are installed but cannot run; what runs: ``test_conformance.py``."""

import ctypes
import sys
from functools import cache
from types import SimpleNamespace

import onnx
import onnxruntime as ort
import pytest

from engines import onnxruntime
from engines.engine import EngineError, GraphInfo


def test_cuda_without_a_driver_is_not_there(monkeypatch):
    """ONNX Runtime's CUDA build names the provider on every machine."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnxruntime.CUDA, onnxruntime.CPU])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert onnxruntime.choose(["cuda", "cpu"], "auto") == ("cpu", "f32")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    assert onnxruntime.choose(["cuda", "cpu"], "auto") == ("cuda", "f32")


def test_openvino_is_asked_once_on_a_cpu_that_it_does_not_take(monkeypatch):
    """As on AMD's: the plugin is registered and offers no device, and a second registration would be an error."""
    registered = []
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", SimpleNamespace(get_library_path=lambda: "plugin"))
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *names: registered.append(names))
    monkeypatch.setattr(ort, "get_ep_devices", list)
    monkeypatch.setattr(onnxruntime, "_openvino_device", cache(onnxruntime._openvino_device.__wrapped__))
    for _ in range(2):
        assert onnxruntime.choose(["openvino", "cpu"], "auto") == ("cpu", "f32")
    assert registered == [(onnxruntime.OPENVINO, "plugin")]


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
        onnxruntime.OnnxRuntimeEngine(path, info, "cuda", "f32")
