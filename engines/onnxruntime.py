"""Engines on ONNX Runtime: its CUDA and CPU providers."""

import ctypes
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.dense import DenseEngine
from engines.engine import EngineError, GraphInfo
from engines.kv_cache import Buffer, KVCache

Provider = Literal["cuda", "cpu"]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CALLS = 4  # shapes whose outputs are kept; a target's logits are tens of megabytes


def available(provider: Provider) -> bool:
    """Whether a provider can be used on this machine."""
    if provider == "cuda" and not _has_cuda_driver():
        return False
    return {"cuda": CUDA, "cpu": CPU}[provider] in ort.get_available_providers()


def choose(providers: Sequence[Provider]) -> Provider:
    """Return the first provider that is present.

    Raises:
        EngineError: none is.
    """
    provider = next((p for p in providers if available(p)), None)
    if provider is None:
        raise EngineError(f"engine.providers: none of {', '.join(providers)} is installed here; install d2sd-triton[cpu]")
    return provider


def _has_cuda_driver() -> bool:
    """ONNX Runtime's CUDA build names the provider wherever it is installed, with a GPU or without."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Call:
    """A call of one shape on one cache, bound once: its inputs are written in place before each run."""

    cache: KVCache
    io: ort.IOBinding
    inputs: dict[str, NDArray]
    outputs: dict[str, NDArray]
    new: list[NDArray]
    held: list[Buffer]  # a binding does not keep its values alive


class OnnxRuntimeEngine(DenseEngine):
    """A graph in ONNX Runtime.

    Args:
        path: the ``.onnx`` file.
        provider: as ``choose`` returned it.
        threads: of the CPU; 0 takes all cores.
    """

    def __init__(self, path: Path, info: GraphInfo, provider: Provider, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # Or the threads of one engine, waiting for its next call, keep the cores from the engine that is called in between.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.runtime = f"ONNX Runtime {ort.__version__}, {provider}, f32"
        # Without TF32, which the provider turns on by itself: f32 is f32, answers do not change.
        names: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if provider == "cuda" else [CPU]
        if provider == "cuda":
            ort.preload_dlls()  # CUDA's and cuDNN's libraries, where pip put them
        self.session = ort.InferenceSession(path, options, providers=names)
        if provider == "cuda" and CUDA not in self.session.get_providers():
            raise EngineError(
                "engine.providers: cuda is installed, but its libraries do not load (ONNX Runtime says which, above); "
                "install d2sd-triton[gpu], or leave cuda out of engine.providers"
            )
        self._calls: OrderedDict[Any, Call] = OrderedDict()
        super().__init__(info)

    def allocate(self, sequences: int, capacity: int) -> list[Buffer]:
        shape = (sequences, self.info.kv_heads, capacity, self.info.head_dim)
        return [_buffer(shape, np.float32) for _ in self.info.cache_bindings]

    def call(self, cache: KVCache, inputs: dict[str, NDArray]) -> tuple[dict[str, NDArray], list[NDArray]]:
        key = (id(cache), *(value.shape for value in inputs.values()))
        call = self._calls.pop(key, None) or self._bind(cache, inputs)
        self._calls[key] = call
        if len(self._calls) > CALLS:
            self._calls.popitem(last=False)
        for name, value in inputs.items():
            call.inputs[name][...] = value
        call.inputs["past_lengths"][...] = cache.lengths
        self.session.run_with_iobinding(call.io)
        return call.outputs, call.new

    def _bind(self, cache: KVCache, inputs: dict[str, NDArray]) -> Call:
        """Make room for the inputs and outputs of a call of this shape and bind it all."""
        for key in [k for k, b in self._calls.items() if not self.in_use(b.cache)]:
            del self._calls[key]
        io = self.session.io_binding()
        given = {name: _buffer(value.shape, value.dtype.type) for name, value in inputs.items()}
        given["past_lengths"] = _buffer(cache.lengths.shape, np.int64)
        given |= {f"past_{name}": buffer for name, buffer in zip(self.info.cache_bindings, cache.buffers, strict=True)}
        sizes: dict[str | int, int] = {}
        for value in self.session.get_inputs():
            io.bind_ortvalue_input(value.name, given[value.name].value)
            sizes.update(zip(value.shape, given[value.name].array.shape, strict=True))
        made = {
            value.name: _buffer(tuple(sizes.get(d, d) for d in value.shape), NUMPY[value.type])
            for value in self.session.get_outputs()
        }
        for name, buffer in made.items():
            io.bind_ortvalue_output(name, buffer.value)
        new = [made.pop(f"new_{name}") for name in self.info.cache_bindings]
        return Call(
            cache,
            io,
            {name: given[name].array for name in (*inputs, "past_lengths")},
            {name: buffer.array for name, buffer in made.items()},
            [buffer.array for buffer in new],
            [*given.values(), *made.values(), *new],
        )


NUMPY: dict[str, type[np.generic]] = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}


def _buffer(shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
    array = np.zeros(shape, dtype)
    return Buffer(array, ort.OrtValue.ortvalue_from_numpy(array))
