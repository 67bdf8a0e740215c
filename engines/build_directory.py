"""A build directory: what ``export/build.py`` wrote, and the engines in it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.engine import Drafter, GraphInfo, Target


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
        backend = manifest["engine"]["backend"]
        if backend != "onnxruntime":
            raise BuildDirectoryError(
                f"{path}: holds {backend} engines, which nothing here runs yet; build with engine.backend onnxruntime"
            )
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
        from engines.onnxruntime import OnnxRuntimeEngine, choose

        options = self.manifest["engine"]
        provider, precision = choose(options["providers"], options["precision"])
        target, *drafters = (
            OnnxRuntimeEngine(self.path / "engines" / graph / "model.onnx", GraphInfo(**recorded["info"]), provider, precision)
            for graph, recorded in self.manifest["graphs"].items()
        )
        first, second = (Drafter(engine) for engine in drafters) if drafters else (None, None)
        return Target(target), first, second
