"""TensorRT's run-time API over ONNX Runtime, for machines without a GPU: what ``engines/tensorrt.py`` asks is carried out.

A context reads its inputs from the addresses that it was given and writes its outputs there; it refuses what TensorRT refuses:
a shape outside the chosen profile, a tensor without an address, a context without memory. An "engine" is the ONNX file itself.
``test_tensorrt.py`` holds the names used here against those of the real library.
"""

import ctypes
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort

__version__ = "double"
SCRATCH = 1024
TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
NAMES = {"tensor(int64)": "INT64", "tensor(float)": "FLOAT", "tensor(bool)": "BOOL"}


def compile_engine(graph: Path, engine: Path, profiles: dict) -> dict:
    """Stand in for ``export.tensorrt_build.build_engine``; returns the same record."""
    model = onnx.load(graph)  # its weights too
    engine.write_bytes(pickle.dumps((model.SerializeToString(), profiles)))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bindings = {
        value.name: {"mode": mode, "dtype": NAMES[value.type], "shape": value.shape}
        for mode, values in (("input", session.get_inputs()), ("output", session.get_outputs()))
        for value in values
    }
    return {
        "library": "double",
        "version": __version__,
        "profiles": profiles,
        "bindings": bindings,
        "bytes": engine.stat().st_size,
    }


def at(address: int, shape, dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Logger:
    WARNING = 2

    def __init__(self, severity):
        pass


ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, serialized):
        try:
            return ICudaEngine(*pickle.loads(serialized))
        except pickle.UnpicklingError:
            return None  # as TensorRT does


class ICudaEngine:
    device_memory_size_v2 = SCRATCH

    def __init__(self, model, profiles):
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._profiles = list(profiles.values())
        self._names = [value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index):
        return self._names[index]

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses, self._axes, self._memory = engine, {}, {}, None, 0

    def set_device_memory(self, memory, size):
        assert size >= SCRATCH
        self._memory = memory

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._axes = self._engine._profiles[profile_index]
        return True

    def set_input_shape(self, name, shape):
        value = next(v for v in self._engine._session.get_inputs() if v.name == name)
        assert self._axes is not None, "shapes are set within a profile"
        for axis, size in zip(value.shape, shape, strict=True):
            least, _, most = self._axes[axis] if isinstance(axis, str) else (axis,) * 3
            if not least <= size <= most:
                return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name, memory):
        assert memory % 64 == 0  # what PyTorch gives on a CPU
        self._addresses[name] = memory
        return name in self._engine._names

    def execute_async_v3(self, stream_handle):
        assert self._memory
        session = self._engine._session
        feeds = {v.name: at(self._addresses[v.name], self._shapes[v.name], TYPES[v.type]) for v in session.get_inputs()}
        made = session.run(None, feeds)
        for value, result in zip(session.get_outputs(), made, strict=True):
            at(self._addresses[value.name], result.shape, result.dtype)[...] = result
        return True
