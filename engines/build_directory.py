"""A build directory: what ``export/build.py`` wrote, and the engines in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.dense import DenseEngine, Drafter, Target
from engines.engine import GraphInfo


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

    def load(self) -> tuple[Target, Drafter | None, Drafter | None]:
        """Load the target and, if the pipeline has them, both drafters on the configured runtime.

        Raises:
            EngineError: the runtime is not to be had here.
        """
        load = self._loader()
        target, *drafters = (
            load(self.path / "engines" / graph, GraphInfo(**recorded["info"]), recorded)
            for graph, recorded in self.manifest["graphs"].items()
        )
        first, second = (Drafter(engine) for engine in drafters) if drafters else (None, None)
        return Target(target), first, second

    def _loader(self) -> Callable[[Path, GraphInfo, dict[str, Any]], DenseEngine]:
        """What loads an engine from its folder, on the runtime that the build is for."""
        options = self.manifest["engine"]
        if options["backend"] == "onnxruntime":
            from engines.onnxruntime import OnnxRuntimeEngine, choose

            provider = choose(options["providers"])
            return lambda folder, info, _: OnnxRuntimeEngine(folder / "model.onnx", info, provider)
        from engines.tensorrt import TensorRTEngine, require

        trt = require(options["backend"])
        return lambda folder, info, recorded: TensorRTEngine(folder / "model.engine", info, recorded["engine"], trt)

    def check_machine(self) -> None:
        """See whether this machine can run the engines, without loading them.

        Raises:
            EngineError: it cannot; the message says what is missing.
        """
        self._loader()
