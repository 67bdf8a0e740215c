"""Engines on TensorRT and TensorRT-RTX. Caches, features, logits and drafts stay on the GPU; accepted tokens leave it.

Everything is queued on PyTorch's current stream: inputs go there from pinned memory, the engine's tensors are bound by
address, accepted rows are written into the cache by a kernel. The host waits in ``read`` alone, which a cycle calls once.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines import sampling
from engines.cache_write import write_rows
from engines.dense import DenseEngine
from engines.engine import Array, EngineError, GraphInfo
from engines.kv_cache import Buffer, KVCache
from engines.tensorrt_library import library

DTYPES = {
    "FLOAT": torch.float32,
    "BF16": torch.bfloat16,
    "HALF": torch.float16,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
ALIGNMENT = 256  # bytes, of every address that is bound
CALLS = 32  # shapes whose buffers and CUDA graph are kept


def require(backend: str) -> ModuleType:
    """The backend's Python module, on a machine where engines run.

    Raises:
        EngineError: the library or a GPU is missing.
    """
    trt = library(backend)
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else f"; PyTorch {torch.__version__} is built without CUDA"
        raise EngineError(f"engine.backend: {backend} engines need an NVIDIA GPU and its driver, none is usable here{build}")
    return trt


def pinned(array: NDArray, device: torch.device) -> Tensor:
    """The array where a device can fetch it while the host goes on; PyTorch keeps that memory until it has been fetched."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(array: NDArray, device: torch.device) -> Tensor:
    """The array on the device; the copy is queued on its stream."""
    return pinned(array, device).to(device, non_blocking=True)


class DeviceKVCache(KVCache):
    """All K and V in one ``[2·layers, B, Hkv, C, D]`` tensor."""

    def write(self, new: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> None:
        table = np.zeros((len(rows), 2 + max(map(len, rows))), np.int64)
        table[:, 0] = self.lengths
        for entry, chosen in zip(table, rows, strict=True):
            entry[1 : 2 + len(chosen)] = len(chosen), *chosen
        cache = self.buffers[0].array
        sent = to_device(table, cache.device)
        write_rows(new[0], sent[:, 2:], sent[:, 1], sent[:, 0], cache)


class DevicePass:
    """A pass of the target whose logits ``[B, N, V]`` lie on the device."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._best: Tensor | None = None
        self._how: Tensor | None = None

    def choose(self, nodes: Tensor, how: Sequence[sampling.Sampling], uniforms: Tensor) -> Tensor:
        nodes = nodes.clamp(min=0)
        if self._best is None:
            self._best = self._logits.argmax(-1)
        best = self._best.gather(1, nodes[:, None])[:, 0]
        if all(sampling.greedy(each) for each in how):
            return best
        if self._how is None:
            table = [(sampling.greedy(each), each.temperature or 1.0, each.top_k, each.top_p) for each in how]
            self._how = to_device(np.array(table), nodes.device)
        greedy, temperature, top_k, top_p = self._how.T[..., None]
        cut = any(each.top_k or each.top_p < 1.0 for each in how)
        logits = self._logits[torch.arange(len(nodes), device=nodes.device), nodes]
        drawn = draw(logits, temperature, (top_k, top_p) if cut else None, uniforms[:, None])
        return torch.where(greedy[:, 0] > 0, best, drawn)

    def log_probabilities(
        self, row: int, nodes: Sequence[int], tokens: Sequence[int], top: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        logits = self._logits[row, list(nodes)].float().cpu().numpy()
        return sampling.log_probabilities(logits, np.array(tokens, dtype=np.int64), top)


def draw(logits: Tensor, temperature: Tensor, cut: tuple[Tensor, Tensor] | None, uniforms: Tensor) -> Tensor:
    """``sampling.choose`` for a batch, on its device.

    Args:
        logits: ``[B, V]``. temperature: ``[B, 1]``, above 0. cut: top_k and top_p, ``[B, 1]`` each; None if no row has either.
        uniforms: ``[B, 1]``. All but the logits are f64.

    Returns:
        ``[B]`` int64.
    """
    scaled = logits.double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature
    if cut is None:
        probabilities = torch.softmax(scaled, -1)
    else:
        top_k, top_p = cut
        descending, order = scaled.sort(descending=True, stable=True)
        beyond = (torch.arange(scaled.shape[1], device=scaled.device) >= top_k) & (top_k > 0)
        descending = torch.softmax(descending.masked_fill(beyond, -torch.inf), -1)
        needed = (descending.cumsum(-1) - descending < top_p) | (top_p >= 1.0)
        probabilities = torch.zeros_like(scaled).scatter_(-1, order, descending * needed)
    tokens = torch.arange(scaled.shape[1], device=scaled.device)
    return (probabilities / sampling.exponentials(uniforms, tokens)).argmax(-1)


@dataclass
class Call:
    """A call of one shape on one cache, bound once.

    Attributes:
        inputs: written in place before each run. outputs: all but the new K/V rows. new: these, ``[2·layers, B, Hkv, T, D]``.
        runs: so far, until it is captured.
    """

    cache: KVCache
    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    new: Tensor
    runs: int = field(default=0)
    graph: torch.cuda.CUDAGraph | None = field(default=None)


class TensorRTEngine(DenseEngine):
    """A compiled engine on a GPU.

    Args:
        path: the ``.engine`` file.
        record: what its build recorded (``export/tensorrt_build.py``): library, version, bytes, profiles, bindings.
        trt: the library's module, as ``require`` returned it.

    Raises:
        EngineError: the file is of another build, or was built by another version; says which.
    """

    cache = DeviceKVCache

    def __init__(self, path: Path, info: GraphInfo, record: dict[str, Any], trt: ModuleType, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.record, self.bindings = record, record["bindings"]
        self.runtime = f"{record['library']} {record['version']}"
        self._trt, self._calls = trt, OrderedDict[Any, Call]()
        advice = "build again: python export/build.py"
        if record["version"] != trt.__version__:
            built, here = (f"{record['library']} {version}" for version in (record["version"], trt.__version__))
            raise EngineError(f"{path}: was built by {built}, this is {here}; {advice}")
        serialized = path.read_bytes()
        if len(serialized) != record["bytes"]:
            raise EngineError(f"{path}: found {len(serialized)} bytes, the build wrote {record['bytes']}; {advice}")
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engine = self._runtime.deserialize_cuda_engine(serialized)
        if self.engine is None:
            raise EngineError(f"{path}: {record['library']} cannot load it on this GPU (its reason is above); {advice}")
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        if names != set(self.bindings):
            odd = ", ".join(sorted(names ^ set(self.bindings)))
            raise EngineError(f"{path}: its bindings are not those that graph.json records ({odd}); {advice}")
        # Calls follow each other on one stream, so their contexts may share one scratch.
        self._scratch = torch.empty(max(1, self.engine.device_memory_size_v2), dtype=torch.uint8, device=self.device)
        super().__init__(info, slots=min(axes["B"][2] for axes in record["profiles"].values()))

    def allocate(self, sequences: int, capacity: int) -> list[Buffer]:
        info = self.info
        dtype = DTYPES[self.bindings["past_k_0"]["dtype"]]
        shape = (2 * info.layers, sequences, info.kv_heads, capacity, info.head_dim)
        array = torch.zeros(shape, dtype=dtype, device=self.device)
        return [Buffer(array, dict(zip((f"past_{name}" for name in info.cache_bindings), array, strict=True)))]

    def send(self, array: NDArray) -> Tensor:
        return to_device(array, self.device)

    def read(self, array: Tensor) -> NDArray:
        return array.cpu().numpy()

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def verified(self, logits: Tensor) -> DevicePass:
        return DevicePass(logits)

    def call(self, cache: KVCache, inputs: dict[str, Array]) -> tuple[dict[str, Array], list[Array]]:
        inputs = {**inputs, "past_lengths": cache.lengths}
        key = (id(cache), *(tuple(value.shape) for value in inputs.values()))
        call = self._calls.pop(key, None) or self._bind(cache, {name: tuple(value.shape) for name, value in inputs.items()})
        self._calls[key] = call
        if len(self._calls) > CALLS:
            self._calls.popitem(last=False)
        for name, value in inputs.items():
            source = value if isinstance(value, Tensor) else pinned(value, self.device)
            call.inputs[name].copy_(source, non_blocking=True)
        self._run(call)
        return call.outputs, [call.new]

    def _run(self, call: Call) -> None:
        """Queue a call. A shape that comes back is captured into a CUDA graph, which is replayed from then on."""
        if call.graph is not None:
            call.graph.replay()
            return
        self._enqueue(call)
        call.runs += 1
        if self.device.type == "cuda" and call.runs == 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._enqueue(call)
            call.graph = graph

    def _enqueue(self, call: Call) -> None:
        if not call.context.execute_async_v3(self._stream()):
            raise EngineError(f"{self.record['library']} failed to run the engine; its reason is above")

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _bind(self, cache: KVCache, shapes: dict[str, tuple[int, ...]]) -> Call:
        """Make room for the inputs and outputs of a call of these shapes, and bind it all to a context of its own."""
        for key in [k for k, c in self._calls.items() if not self.in_use(c.cache)]:
            del self._calls[key]
        past = cache.buffers[0].value
        shapes = shapes | {name: tuple(view.shape) for name, view in past.items()}
        sizes: dict[str | int, int] = {}
        for name, shape in shapes.items():
            sizes.update(zip(self.bindings[name]["shape"], shape, strict=True))
        given = {name: self._empty_tensor(name, sizes) for name in shapes if name not in past}
        new = self._room_for_rows(sizes)
        rows = dict(zip((f"new_{name}" for name in self.info.cache_bindings), new, strict=True))
        made = [name for name, binding in self.bindings.items() if binding["mode"] == "output" and name not in rows]
        outputs = {name: self._empty_tensor(name, sizes) for name in made}
        context = self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        done = [context.set_optimization_profile_async(self._profile(sizes), self._stream())]
        done += [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        tensors = (given | past | outputs | rows).items()
        done += [context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in tensors]
        if not all(done):
            raise EngineError(f"{self.record['library']} refused to bind a call; its reason is above")
        return Call(cache, context, given, outputs, new)

    def _empty_tensor(self, name: str, sizes: dict[str | int, int]) -> Tensor:
        binding = self.bindings[name]
        return torch.empty([sizes.get(d, d) for d in binding["shape"]], dtype=DTYPES[binding["dtype"]], device=self.device)

    def _room_for_rows(self, sizes: dict[str | int, int]) -> Tensor:
        """Room for the new K/V rows of all layers, each layer's at an address that can be bound."""
        binding = self.bindings["new_k_0"]
        shape, dtype = [sizes.get(d, d) for d in binding["shape"]], DTYPES[binding["dtype"]]
        unit = ALIGNMENT // dtype.itemsize
        layer = -(-int(np.prod(shape)) // unit) * unit
        memory = torch.empty(2 * self.info.layers * layer, dtype=dtype, device=self.device)
        strides = np.cumprod([1, *shape[:0:-1]])[::-1].tolist()
        return memory.as_strided((2 * self.info.layers, *shape), (layer, *strides))

    def _profile(self, sizes: dict[str | int, int]) -> int:
        """The first profile that a call fits into.

        Raises:
            EngineError: it fits into none.
        """
        for number, axes in enumerate(self.record["profiles"].values()):
            if all(least <= sizes[axis] <= most for axis, (least, _, most) in axes.items()):
                return number
        asked = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if isinstance(axis, str))
        raise EngineError(f"the engine was built for no call of {asked}; raise limits in the pipeline and build again")
