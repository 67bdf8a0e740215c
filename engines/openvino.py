"""Engines on OpenVINO's own runtime, for CPUs: one graph over rows of many sequences, their K/V in a pool of blocks.

It reads the ONNX file that ``export/paged_graph.py`` wrote; how it reads the project's own operators in it:
``openvino_operators.py``.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import openvino_operators
from engines.cpu import has
from engines.engine import EngineError, GraphInfo
from engines.kept import NUMBERS, Kept, move
from engines.memory import free_memory
from engines.openvino_fusion import fuse
from engines.paged import BLOCK
from plugins.openvino.library import Library

ADVICE = "install d2sd-triton[cpu], or choose engine.backend onnxruntime"
Precision = str  # of activations: f32 or bf16
# Of quantised weights alone: where the CPU multiplies 8-bit numbers, OpenVINO rounds activations to 8 bits in groups as long as
# a block of weights. Elsewhere it means nothing.
ROUNDED = 32
Form = tuple[int, int]  # rows of tokens, or of features and then of blocks' tokens; (0, 0) stands for any number
ANY = (0, 0)
TARGET = tuple(
    (rows, 0) for rows in (1, 8, 4, 2, 16, 3, 6, 12, 24, 20, 32)
)  # that get a form of their own, the most useful first
FORMS = 1 / 8  # of the memory that is free, for their weights
BLOCKS = 64  # of the pool for each row of such a call; one with longer sequences takes the form for any number
STEP = 8  # larger calls have a multiple of so many rows, so that few shapes are met


def require() -> Any:
    """OpenVINO's module.

    Raises:
        EngineError: it is not installed, or does not load here.
    """
    try:
        import openvino
    except ImportError as error:
        raise EngineError(f"engine.backend: openvino does not load here ({error}); {ADVICE}") from None
    return openvino


def choose(precision: str) -> Precision:
    """What ``auto`` means here: bf16 where the CPU multiplies it in tiles (AMX), else f32."""
    # Without tiles OpenVINO's bf16 is slower than its f32 from 16 rows on (docs/engines.md).
    return precision if precision != "auto" else "bf16" if has("amx_bf16") else "f32"


class OpenVinoGraph:
    """A graph in OpenVINO, compiled once for any number of rows, and once for each of the usual ones.

    A call of another shape than the one before it works out the shapes of a thousand nodes anew, which takes as long as three
    more rows; where the number of rows stands fast there is nothing to work out (docs/engines.md). With our attention nothing
    else changes its shape there either: what is told of sequences and blocks lies in buffers as large as the rows can need.

    Args:
        folder: of the engine, with ``paged.onnx``. precision: f32 or bf16.
        blocks: of the pool, and one more. operators: the library of ``plugins/openvino``; None: OpenVINO's own.
        block_size: γ of a drafter. kept: what K/V are kept in (``openvino_operators.keeps``).

    Attributes:
        forms: numbers of rows that have a form of their own: as many as memory is left for.

    Raises:
        EngineError: the file is broken, or of another version of OpenVINO.
    """

    def __init__(
        self,
        folder: Path,
        info: GraphInfo,
        precision: Precision,
        blocks: int,
        operators: Library | None,
        block_size: int,
        kept: Kept,
    ) -> None:
        ov = require()
        self.info = info
        pairs = ", attention in bf16" if kept == "pairs" else ""
        own = f", own operators ({operators.instructions.name}{pairs})" if operators else ""
        self.runtime = f"OpenVINO {ov.__version__.split('-')[0]}, {precision}{own}"
        self._ov, self._core = ov, ov.Core()
        for extension in openvino_operators.extensions(ov, info, precision, operators):
            self._core.add_extension(extension)
        self._fixed = openvino_operators.attends(info, precision, operators)
        path = folder / "paged.onnx"
        self._options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "KV_CACHE_PRECISION": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(ROUNDED),
        }
        shape = (2 * info.layers, blocks, info.kv_heads, BLOCK, info.head_dim)
        self.cache: NDArray = np.zeros(shape, NUMBERS[kept])
        self.move = partial(move, self.cache, kept)
        kind = {"f32": ov.Type.f32, "f16": ov.Type.u8, "pairs": ov.Type.i8, "bf16": ov.Type.bf16}[kept]
        # A request does not keep alive what it reads in place. Our attention needs to know where a pool begins, no more: while
        # it compiles, OpenVINO takes memory of its own for all that a shape names.
        shown = self.cache[:, :1] if self._fixed else self.cache
        if kept in ("f16", "pairs"):  # which OpenVINO would turn into f32, if it knew of them: bytes, and such with signs
            shown = shown.view(np.uint8 if kept == "f16" else np.int8)
        self._held = {
            f"past_{name}": ov.Tensor(rows, list(rows.shape), kind)
            if precision == "bf16"
            else ov.Tensor(rows, shared_memory=True)
            for name, rows in zip(info.cache_bindings, shown, strict=True)
        }
        weights = sum(file.stat().st_size for file in folder.glob("*.data"))
        usual: tuple[Form, ...] = TARGET
        if info.mask_id >= 0:  # all shapes of a drafter's call are fixed, or none: block by block of a sequence or two
            usual = ((STEP, block_size), (STEP, 2 * block_size)) if self._fixed else ()
        self.forms: Sequence[Form] = tuple(sorted(usual[: int(FORMS * free_memory() / max(weights, 1))]))
        self._requests: dict[Form, Any] = {}
        self._buffers: dict[Form, dict[str, NDArray]] = {}  # where all shapes are fixed: what a call is told
        try:
            self._model = self._core.read_model(path)
            if operators:
                fuse(self._model, operators)
            for binding in self._model.inputs:
                if binding.get_any_name() in self._held:
                    binding.get_node().set_element_type(kind)
            self._request(ANY)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"{path}: OpenVINO cannot load it ({reason}); build again: python export/build.py") from None
        self._outputs = [output.get_any_name() for output in self._requests[ANY].model_outputs]

    def _request(self, form: Form) -> Any:
        """What runs calls of a form; compiled when it is first asked for."""
        if form not in self._requests:
            model = self._model.clone()
            sizes = _sizes(form, told=self._fixed) if form != ANY else {}
            shapes = {binding.get_any_name(): _shape(binding, self.info, sizes) for binding in model.inputs}
            if self._fixed:
                shapes |= {name: self._ov.PartialShape(list(tensor.shape)) for name, tensor in self._held.items()}
            model.reshape(shapes)
            request = self._core.compile_model(model, "CPU", self._options).create_infer_request()
            for name, tensor in self._held.items():
                request.set_tensor(name, tensor)
            if sizes and self._fixed:
                told = [binding.get_any_name() for binding in model.inputs if binding.get_any_name() not in self._held]
                self._buffers[form] = {name: request.get_tensor(name).data.reshape(-1) for name in told}
            self._requests[form] = request
        return self._requests[form]

    def prepare(self) -> None:
        """Compile all forms, as many at a time as there are cores: one alone would take one of them."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
            list(workers.map(self._request, self.forms))

    def fit(self, rows: int) -> int:
        most = self.forms[-1][0] if self.forms else 0
        return next(size for size, _ in self.forms if size >= rows) if rows <= most else -(-rows // STEP) * STEP

    def run(self, inputs: dict[str, NDArray]) -> dict[str, NDArray]:
        form = self._form(inputs)
        request = self._request(form)
        if form in self._buffers:
            for name, buffer in self._buffers[form].items():
                buffer[: inputs[name].size] = inputs[name].reshape(-1)
        else:
            for name, value in inputs.items():
                request.set_tensor(name, self._ov.Tensor(value, shared_memory=bool(value.size and value.ndim)))
        request.infer()
        return {name: request.get_tensor(name).data for name in self._outputs}

    def _form(self, inputs: dict[str, NDArray]) -> Form:
        """That a call has."""
        if "features" in inputs:
            form = inputs["features"].shape[1], inputs["block_ids"].shape[1]
        elif len(inputs["asked"]) == inputs["token_ids"].shape[1]:
            form = len(inputs["asked"]), 0
        else:
            return ANY
        fits = not self._fixed or len(inputs["block_indices"]) <= _attended(form) * BLOCKS
        return form if form in self.forms and fits else ANY


def _attended(form: Form) -> int:
    """Rows that attention takes: a drafter's features, and its blocks twice (``paged.PagedDrafter``)."""
    return form[0] + 2 * form[1]


def _sizes(form: Form, *, told: bool) -> dict[str, int]:
    """Rows in a form's bindings. told: sizes of what is told of sequences and blocks, too, the largest that can be needed."""
    first, blocks = form
    rows = _attended(form)
    sizes = {"features": first, "block_ids": blocks, "positions": first + blocks, "out_rows": blocks}
    sizes |= {"key_rows": rows, "query_rows": rows, "token_ids": rows, "asked": rows}
    if told:
        sizes |= {"past_lens": rows, "subsequence_begins": rows + 1}
        sizes |= {"block_indices": rows * BLOCKS, "block_indices_begins": rows + 1}
        sizes |= {"qq_bias": rows * rows, "qq_bias_begins": rows + 1}
    return sizes


def _shape(binding: Any, info: GraphInfo, sizes: dict[str, int]) -> Any:
    """A binding's, as far as it is known: one row of tokens, as many as ``sizes`` says or any number, and blocks of a pool."""
    name, shape = binding.get_any_name(), binding.get_partial_shape()
    if name.removeprefix("past_") in info.cache_bindings:
        shape[2] = BLOCK
    elif name in ("token_ids", "positions", "features", "block_ids"):
        shape[0] = 1
    if name in sizes:
        shape[1 if name == "features" else len(shape) - 1] = sizes[name]
    return shape
