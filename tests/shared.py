"""Tiny pipelines and their builds, made once in a run of the tests: exporting a graph is the slowest thing that they do."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.build import build
from export.config import load
from tests import tiny


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills, by whichever worker comes first; the others wait for it. Nobody changes it afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.made")
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make(folder)
            made.touch()
    return folder


def pipeline(factory: pytest.TempPathFactory, architecture: str = "llama") -> Path:
    """The file of a tiny pipeline; its checkpoints lie beside it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    return once(base / "shared" / architecture, lambda folder: tiny.save_pipeline(folder, architecture)) / "pipeline.yaml"


def built(file: Path, **engine: object) -> Path:
    """Its build for a backend, OpenVINO if nothing else is said, by other options of ``engine``, too."""
    options = load(file)
    options = options.model_copy(update={"engine": options.engine.model_copy(update=engine)})

    def make(folder: Path) -> None:
        if options.engine.backend == "onnxruntime":  # whose graphs are OpenVINO's
            shutil.copytree(built(file), folder)
        build(options, folder)

    return once(file.parent / options.engine.backend, make)


def copied(factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline and, in ``build``, its build, to be changed."""
    root, file = factory.mktemp("tiny"), pipeline(factory)
    for checkpoint in ("target", "first", "second"):
        shutil.copytree(file.parent / checkpoint, root / checkpoint)
    servers = shutil.ignore_patterns("__pycache__", "*costs.json*")  # what those that serve it write meanwhile
    shutil.copytree(built(file), root / "build", ignore=servers)
    (root / "pipeline.yaml").write_text(file.read_text().replace(str(file.parent), str(root)))
    return root
