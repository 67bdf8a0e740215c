"""``python export/build.py pipeline.yaml``: compile a pipeline into engines and a Triton model repository.

Each engine lies in a folder of its own, with the key of all that it was made from, and appears there whole or not at all:
what has its key already is left alone, and an interrupted build goes on where it was.
"""

import argparse
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, get_args

from decoding.ngrams import NGrams, NGramsError
from engines.build_directory import NGRAMS
from export import tensorrt_build
from export.config import Backend, CompiledBackend, Pipeline, UserError, load
from export.files import replacing
from export.paged_graph import write_paged
from export.repository import write_repository

if TYPE_CHECKING:
    from export.sources import Sources

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = ("target", "first", "second")
# What an exported graph follows from, besides its checkpoints.
SOURCES = (
    *("export/target.py", "export/drafter.py", "export/onnx_export.py", "export/paged_graph.py"),
    *("export/blocks.py", "export/quantise.py"),
    *("plugins/cascade_attention/op.py", "plugins/cascade_attention/function_body.py"),
)
# What a TensorRT engine follows from too.
COMPILED = (
    "export/tensorrt_build.py",
    *(f"plugins/cascade_attention/{name}.py" for name in ("kernel", "compiled", "split", "tensorrt_plugin")),
)
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "gguf")


class BuildError(UserError):
    """The pipeline cannot be built; the message says why and what to do."""


def build(pipeline: Pipeline, output: Path, only: str | None = None, force: bool = False) -> None:
    """Bring ``output`` up to date with a pipeline.

    Args:
        only: build this graph alone. force: build again what is up to date.

    Raises:
        BuildError, CheckpointError: with one clear line.
    """
    compiled = pipeline.engine.backend in get_args(CompiledBackend)
    if compiled:
        tensorrt_build.library(pipeline.engine.backend)  # before any other work
    from export.sources import open_sources  # PyTorch takes seconds that --help and a bad file need not wait for

    began = time.monotonic()
    table, ngrams = pipeline.decoding.ngrams, _ngrams(pipeline)
    sources = open_sources(pipeline)
    if ngrams is not None and ngrams.vocabulary != (size := sources.config.vocab_size):
        raise BuildError(f"decoding.ngrams: found a table for {ngrams.vocabulary} tokens, allowed: the target's {size}")
    shapes = {graph: _profiles(pipeline, sources, graph) if compiled else {} for graph in sources.graphs}
    keys = {graph: _key(pipeline, sources, graph, shapes[graph]) for graph in sources.graphs}
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        manifest = output / "manifest.json"  # is not there while parts of two builds lie here
        for number, graph in enumerate(keys, 1):
            place = output / "engines" / graph
            label = f"[{number}/{len(keys)}] {graph}"
            if only not in (None, graph):
                continue
            if not force and _stored(place).get("key") == keys[graph]:
                print(f"{label}: up to date", flush=True)
                continue
            print(f"{label}: exporting …", flush=True)
            start = time.monotonic()
            with replacing(place) as partial:
                partial.mkdir()
                info, weights = sources.export(graph, partial / "model.onnx", pipeline.engine.graph_dtype)
                record: dict[str, Any] = {"key": keys[graph], "info": asdict(info), "weights": weights}
                if not compiled:
                    write_paged(partial / "model.onnx", partial / "paged.onnx")
                if compiled:
                    print(f"{label}: building the engine …", flush=True)
                    record["engine"] = _compile(pipeline.engine.backend, partial, shapes[graph], output)
                write_json(partial / "graph.json", record)
                manifest.unlink(missing_ok=True)
            print(f"{label}: done in {time.monotonic() - start:.0f} s", flush=True)
        stale = [graph for graph, key in keys.items() if _stored(output / "engines" / graph).get("key") != key]
        if stale:
            print(f"still to be built before this can be served: {', '.join(stale)}")
            return
        with ExitStack() as parts:  # all are written before one takes its place, and the first of them does so last
            write_json(parts.enter_context(replacing(manifest)), _manifest(pipeline, sources, output))
            if pipeline.engine.backend == "openvino":
                _write_operators(parts.enter_context(replacing(output / "operators")))
            write_repository(parts.enter_context(replacing(output / "model_repository")))
            tokenizer = parts.enter_context(replacing(output / "tokenizer"))
            tokenizer.mkdir()
            sources.copy_tokenizer(tokenizer)
            if table is not None:
                shutil.copyfile(table, parts.enter_context(replacing(output / NGRAMS)))
            manifest.unlink(missing_ok=True)
            if table is None:
                (output / NGRAMS).unlink(missing_ok=True)
    print(f"{output}: ready after {time.monotonic() - began:.0f} s", flush=True)


def _ngrams(pipeline: Pipeline) -> NGrams | None:
    """The table of n-grams, if the pipeline names one."""
    file = pipeline.decoding.ngrams
    if file is None:
        return None
    try:
        return NGrams.read(Path(file))
    except NGramsError as error:
        raise BuildError(f"decoding.ngrams: {error}; python -m training.ngrams makes one") from None


def _write_operators(folder: Path) -> None:
    """The project's operators, compiled for OpenVINO; a build without them is served, and slower."""
    from export.checkpoints import cache_directory
    from plugins.openvino import library

    folder.mkdir()
    try:
        for made in library.compiled(cache_directory() / "operators"):
            shutil.copy(made.path, folder)
    except library.CompileError as error:
        print(f"operators: {error}", flush=True)


def _profiles(pipeline: Pipeline, sources: "Sources", graph: str) -> tensorrt_build.Profiles:
    decoding, limits = pipeline.decoding, pipeline.limits
    return tensorrt_build.profiles(graph, sources.block_size, decoding.branches, limits.sequences, limits.length)


def _compile(backend: str, folder: Path, shapes: tensorrt_build.Profiles, output: Path) -> dict[str, Any]:
    """Turn a folder's graph into an engine; returns what is recorded of it."""
    graph, engine = folder / "model.onnx", folder / "model.engine"
    record = tensorrt_build.build_engine(backend, graph, engine, shapes, output / f"{backend}.timings")
    for file in folder.glob("*.onnx*"):  # as large as the engine, and no longer needed
        file.unlink()
    return record | {"bytes": engine.stat().st_size}


def _key(pipeline: Pipeline, sources: "Sources", graph: str, shapes: tensorrt_build.Profiles) -> str:
    """SHA-256 of all that an engine follows from."""
    backend = pipeline.engine.backend
    compiled = backend in get_args(CompiledBackend)
    code = SOURCES + COMPILED if compiled else SOURCES
    made_from = {
        "backend": [backend if compiled else "onnx", pipeline.engine.graph_dtype, shapes],
        "library": tensorrt_build.library(backend).__version__ if compiled else None,
        "device": tensorrt_build.device(backend),
        "checkpoints": sources.fingerprints(graph),
        "code": {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in code},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _stored(place: Path) -> dict[str, Any]:
    """What a built graph says of itself; empty if it is not there."""
    try:
        return json.loads((place / "graph.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _manifest(pipeline: Pipeline, sources: "Sources", output: Path) -> dict[str, Any]:
    """All that the server needs to know."""
    return {
        "graphs": {graph: _stored(output / "engines" / graph) for graph in sources.graphs},
        "end_ids": sources.end_ids,
        "decoding": pipeline.decoding.model_dump() | {"block_size": sources.block_size},
        "engine": pipeline.engine.model_dump(),
        "limits": pipeline.limits.model_dump(),
        "triton": pipeline.triton.model_dump(),
    }


@contextmanager
def _alone(output: Path) -> Iterator[IO[str]]:
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{output}: another build is writing here; wait for it or name another --output") from None
        yield lock


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def storage_error(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if an error comes from that: libraries wrap the system's error, or only quote it."""
    full = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)}
    while error is not None:
        if isinstance(error, OSError) and error.strerror in full:
            return error.strerror + (f" ({error.filename})" if error.filename else "")
        if quoted := next((reason for reason in full if reason.lower() in str(error).lower()), None):
            return quoted
        error = error.__cause__ or error.__context__
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python export/build.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path, help="the pipeline.yaml")
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder of the build (default: build/)")
    parser.add_argument("--backend", choices=get_args(Backend), help="overrides engine.backend")
    parser.add_argument("--only", choices=GRAPHS, help="build one graph alone")
    parser.add_argument("--force", action="store_true", help="build again what is up to date")
    args = parser.parse_args(arguments)
    try:
        pipeline = load(args.pipeline, args.backend)
        build(pipeline, args.output, args.only, args.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (reason := storage_error(error)) is None:
            raise
        whole = (args.output / "manifest.json").exists()
        left = "the former build is whole" if whole else "no build is whole; the same command goes on from here"
        print(f"error: {args.output}: {reason}; {left}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
