"""A build directory: what ``export/build.py`` wrote, and the engines in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import costs
from engines.costs import Costs
from engines.dense import DenseEngine, Drafter, Target
from engines.engine import GraphInfo
from engines.kept import Kept
from engines.memory import pool_blocks

NGRAMS = "ngrams.npz"


class BuildDirectoryError(RuntimeError):
    """The directory cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class BuildDirectory:
    """A complete build.

    Attributes:
        path: the directory. manifest: what its ``manifest.json`` holds.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "BuildDirectory":
        """Open a build.

        Raises:
            BuildDirectoryError: it is not there, not complete, or its parts are of different builds.
        """
        advice = f"run: python export/build.py pipeline.yaml --output {path}"
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            graphs = manifest["graphs"]
        except FileNotFoundError:
            raise BuildDirectoryError(f"{path}: holds no complete build; {advice}") from None
        except (OSError, ValueError, KeyError) as error:
            raise BuildDirectoryError(f"{path}: manifest.json cannot be read ({error}); {advice}") from None
        for graph, recorded in graphs.items():
            place = path / "engines" / graph / "graph.json"
            try:
                found = json.loads(place.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = None
            if found != recorded:
                raise BuildDirectoryError(f"{path}: engine {graph} is of another configuration than the build; {advice}")
        return cls(path, manifest)

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def vocabulary(self) -> int:
        """V, of the target."""
        return int(self.manifest["graphs"]["target"]["info"]["vocabulary"])

    @property
    def ngrams(self) -> Path | None:
        """The table of what the target usually says next (``decoding.ngrams``), if the pipeline names one."""
        return self.path / NGRAMS if self.manifest["decoding"].get("ngrams") else None

    def load(self) -> tuple[Any, Any, Any]:
        """Load the target and, if the pipeline has them, both drafters on the configured runtime; None for those it lacks.

        Returns:
            Engines as ``decoding/engines.py`` asks for them.

        Raises:
            EngineError: the runtime is not to be had here, or the machine has not the memory.
        """
        make = self._loader()
        target, *drafters = (
            make(self.path / "engines" / graph, GraphInfo(**recorded["info"]), recorded)
            for graph, recorded in self.manifest["graphs"].items()
        )
        first, second = drafters or (None, None)
        return target, first, second

    def _loader(self) -> Callable[[Path, GraphInfo, dict[str, Any]], Any]:
        """What makes a model of an engine's folder, on the runtime that the build is for."""
        options = self.manifest["engine"]
        if options["backend"] == "openvino":
            return self._paged(options["precision"])
        make: Callable[[Path, GraphInfo, dict[str, Any]], DenseEngine]
        if options["backend"] == "onnxruntime":
            from engines.onnxruntime import OnnxRuntimeEngine, choose

            provider = choose(options["providers"])
            make = lambda folder, info, _: OnnxRuntimeEngine(folder / "model.onnx", info, provider)  # noqa: E731
        else:
            from engines.tensorrt import TensorRTEngine, require

            trt = require(options["backend"])
            make = lambda folder, info, recorded: TensorRTEngine(  # noqa: E731
                folder / "model.engine", info, recorded["engine"], trt
            )
        return lambda folder, info, recorded: (Target if info.mask_id < 0 else Drafter)(make(folder, info, recorded))

    def _paged(self, wanted: str) -> Callable[[Path, GraphInfo, dict[str, Any]], Any]:
        from engines.openvino import OpenVinoGraph, choose, require
        from engines.openvino_operators import keeps, usable
        from engines.paged import PagedDrafter, PagedTarget, block_bytes, scratch_rows, sequence_blocks

        require()
        precision, limits = choose(wanted), self.manifest["limits"]
        operators = usable(self.path / "operators") if precision == "f32" else None

        def kept(info: GraphInfo, recorded: dict[str, Any]) -> Kept:
            return keeps(info, precision, operators, rounded=recorded["weights"]["form"] != "f32")

        size, branches = (self.manifest["decoding"][name] for name in ("block_size", "branches"))
        scratch = scratch_rows(size, branches)
        one = sequence_blocks(limits["length"], scratch)
        every = [(GraphInfo(**recorded["info"]), recorded) for recorded in self.manifest["graphs"].values()]
        all_bytes = sum(block_bytes(info, 4 if kept(info, recorded) == "f32" else 2) for info, recorded in every)
        blocks = pool_blocks(limits["kv_memory"], all_bytes, one * limits["sequences"], one)

        def make(folder: Path, info: GraphInfo, recorded: dict[str, Any]) -> Any:
            graph = OpenVinoGraph(folder, info, precision, blocks + 1, operators, size, kept(info, recorded))
            return (PagedTarget if info.mask_id < 0 else PagedDrafter)(graph, scratch)

        return make

    def costs(self, target: Any, first: Any, second: Any, again: bool = False, say: Callable[[str], None] = print) -> Costs:
        """What calls of these engines take on this machine: what the build's file says, or measured now. The engines
        have been run when this returns.

        Args:
            again: measure, whatever the file says. say: told of the progress.
        """
        graphs = self.manifest["graphs"]
        identity = {
            "form": costs.FORM,
            "machine": costs.machine(),
            "runtime": target.runtime,
            "steps": [costs.steps(engine) for engine in (target, first, second) if engine is not None],
            "engines": {name: recorded["key"] for name, recorded in graphs.items()},
            "operators": sorted(file.name for file in (self.path / "operators").glob("*.so")),
        }
        file = self.path / "costs.json"
        known = None if again else costs.load(file, identity)
        drafters = [drafter for drafter in (first, second) if drafter is not None]
        about = target, drafters, graphs["target"]["info"]["feature_width"], self.manifest["limits"]["length"]
        if known is None:
            say(f"costs: measuring what calls take on {identity['machine']}")
            known = costs.measure(*about, say)
            costs.save(file, identity, known)
        else:
            costs.meet(*about, say)
        return known

    def check_machine(self) -> None:
        """See whether this machine can run the engines, without loading them.

        Raises:
            EngineError: it cannot; the message says what is missing.
        """
        self._loader()
