"""Builds of a tiny pipeline: what is rebuilt, what is left alone, and what an interruption leaves behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.build_directory import BuildDirectory, BuildDirectoryError
from export import build as builder
from export.build import GRAPHS, BuildError, build, main
from export.config import load
from export.sources import Sources
from tests import shared, tiny
from tests.decoding import toys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished build with its checkpoints."""
    return shared.copied(tmp_path_factory)


@pytest.fixture
def pipeline(finished, tmp_path):
    """A copy of a finished build and its checkpoints, to be changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "pipeline.yaml"
    file.write_text(file.read_text().replace(str(finished), str(tmp_path)))
    return tmp_path


def stamps(root):
    return {graph: (root / "build" / "engines" / graph / "model.onnx").stat().st_mtime_ns for graph in GRAPHS}


def rebuilt(root, before):
    after = stamps(root)
    return [graph for graph in GRAPHS if after[graph] != before[graph]]


def test_a_build_is_complete(finished):
    manifest = BuildDirectory.open(finished / "build").manifest
    assert list(manifest["graphs"]) == list(GRAPHS)
    assert manifest["decoding"]["block_size"] == 6
    assert manifest["end_ids"] == [1]
    models = {path.name for path in (finished / "build" / "model_repository").iterdir()}
    assert models == {"ensemble", "preprocessing", "d2sd", "tensorrt_llm_bls"}
    assert not [path for path in (finished / "build").rglob("*") if path.name.endswith((".partial", ".old"))]


def test_building_again_touches_nothing(pipeline, capsys):
    before = stamps(pipeline)
    build(load(pipeline / "pipeline.yaml"), pipeline / "build")
    assert rebuilt(pipeline, before) == []
    assert capsys.readouterr().out.count("up to date") == 3


def test_a_changed_drafter_rebuilds_itself_alone(pipeline):
    before = stamps(pipeline)
    shutil.rmtree(pipeline / "second")
    tiny.save_drafter(pipeline / "second", seed=7)
    build(load(pipeline / "pipeline.yaml"), pipeline / "build")
    assert rebuilt(pipeline, before) == ["second"]


@pytest.mark.slow
def test_a_changed_target_rebuilds_all(pipeline):
    before = stamps(pipeline)
    shutil.rmtree(pipeline / "target")
    tiny.save_target(pipeline / "target", seed=3)
    build(load(pipeline / "pipeline.yaml"), pipeline / "build")
    assert rebuilt(pipeline, before) == list(GRAPHS)


def test_an_option_of_the_server_rebuilds_no_graph(pipeline):
    before = stamps(pipeline)
    file = pipeline / "pipeline.yaml"
    file.write_text(file.read_text().replace("branches: 3", "branches: 2"))
    build(load(file), pipeline / "build")
    assert rebuilt(pipeline, before) == []
    assert BuildDirectory.open(pipeline / "build").manifest["decoding"]["branches"] == 2


def test_force_and_only(pipeline):
    before = stamps(pipeline)
    build(load(pipeline / "pipeline.yaml"), pipeline / "build", only="first", force=True)
    assert rebuilt(pipeline, before) == ["first"]
    BuildDirectory.open(pipeline / "build")


def test_only_leaves_an_incomplete_build_unserved(pipeline, capsys):
    shutil.rmtree(pipeline / "build")
    build(load(pipeline / "pipeline.yaml"), pipeline / "build", only="second")
    assert "still to be built before this can be served: target, first" in capsys.readouterr().out
    with pytest.raises(BuildDirectoryError, match=r"holds no complete build; run: python export/build.py"):
        BuildDirectory.open(pipeline / "build")


def test_an_engine_of_another_configuration_is_refused(pipeline):
    graph = pipeline / "build" / "engines" / "first" / "graph.json"
    graph.write_text(json.dumps(json.loads(graph.read_text()) | {"key": "of another"}))
    with pytest.raises(BuildDirectoryError, match="engine first is of another configuration than the build"):
        BuildDirectory.open(pipeline / "build")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(self, graph, path, dtype):
    path.write_bytes(b"half")
    full()


def full_behind_the_operators(source, place, copy=shutil.copyfile, **options):
    return full() if "ngrams" in str(place) else copy(source, place, **options)


@pytest.mark.parametrize(
    ("writer", "fails", "force"),
    [
        ("export.sources.Sources.export", half, True),
        ("export.build.write_json", full, False),  # the manifest
        ("export.build.write_repository", full, False),
        ("export.sources.Sources.copy_tokenizer", full, False),
        ("shutil.copyfile", full, False),  # an operator
        ("shutil.copyfile", full_behind_the_operators, False),
    ],
)
def test_a_full_disk_leaves_the_former_build(pipeline, monkeypatch, capsys, writer, fails, force):
    table = pipeline / "table.npz"
    toys.ngrams(300).write(table)
    file, output = pipeline / "pipeline.yaml", pipeline / "build"
    file.write_text(file.read_text().replace("branches: 3", f"branches: 2, ngrams: {table}"))
    before, files = stamps(pipeline), sorted(output.rglob("*"))
    manifest = BuildDirectory.open(output).manifest
    with monkeypatch.context() as patch:
        patch.setattr(writer, fails)
        assert main([str(file), "--output", str(output), *["--force"] * force]) == 1
    assert capsys.readouterr().err == f"error: {output}: No space left on device; the former build is whole\n"
    assert BuildDirectory.open(output).manifest == manifest
    assert sorted(output.rglob("*")) == files
    build(load(file), output)
    assert rebuilt(pipeline, before) == []
    assert (output / "ngrams.npz").read_bytes() == table.read_bytes()


def test_a_full_disk_behind_the_first_new_engine(pipeline, monkeypatch, capsys):
    """Two builds' parts lie there: neither is served, and the message says so."""
    file, output = pipeline / "pipeline.yaml", pipeline / "build"
    export = Sources.export

    def second_fails(self, graph, path, dtype):
        return full() if graph == "second" else export(self, graph, path, dtype)

    (output / "engines" / "first" / "graph.json").unlink()
    shutil.rmtree(output / "engines" / "second")
    with monkeypatch.context() as patch:
        patch.setattr("export.sources.Sources.export", second_fails)
        assert main([str(file), "--output", str(output)]) == 1
    last = "No space left on device; no build is whole; the same command goes on from here"
    assert capsys.readouterr().err == f"error: {output}: {last}\n"
    with pytest.raises(BuildDirectoryError, match="holds no complete build"):
        BuildDirectory.open(output)
    assert not list(output.rglob(".*.partial"))


@pytest.mark.slow
def test_a_killed_build_leaves_no_half_engine_and_goes_on(pipeline):
    """A real process, killed while it exports."""
    shutil.rmtree(pipeline / "build" / "engines" / "target")
    command = [sys.executable, str(ROOT / "export" / "build.py"), "pipeline.yaml"]
    process = subprocess.Popen(command, cwd=pipeline, stdout=subprocess.DEVNULL)
    partial = pipeline / "build" / "engines" / ".target.partial"
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (pipeline / "build" / "engines" / "target").exists()
    build(load(pipeline / "pipeline.yaml"), pipeline / "build")
    BuildDirectory.open(pipeline / "build")
    assert not partial.exists()


@pytest.mark.slow
def test_a_full_disk_ends_a_build_in_one_line(pipeline):
    """A limit of the file size stands for it: the writes of all libraries fail as they do on a full disk."""
    before = stamps(pipeline)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from export.build import main; sys.exit(main(['pipeline.yaml', '--force', '--only', 'target']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pipeline, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "error: build: File too large; the former build is whole"
    assert "Traceback" not in done.stderr
    assert rebuilt(pipeline, before) == []
    assert not list((pipeline / "build" / "engines").glob(".*"))
    build(load(pipeline / "pipeline.yaml"), pipeline / "build")
    assert rebuilt(pipeline, before) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device", "x.onnx"), "No space left on device (x.onnx)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("another"), None),
    ],
)
def test_what_is_wrong_with_the_disk(error, reason):
    assert builder.storage_error(error) == reason
    wrapped = ValueError("of a library")
    wrapped.__cause__ = error
    assert builder.storage_error(wrapped) == reason


def test_two_builds_of_one_directory(pipeline):
    with builder._alone(pipeline / "build"), pytest.raises(BuildError, match="another build is writing here"):
        build(load(pipeline / "pipeline.yaml"), pipeline / "build")


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    file = tiny.save_pipeline(tmp_path)
    file.write_text(file.read_text().replace("branches: 3", "branches: many"))
    capsys.readouterr()
    assert main([str(file), "--output", str(tmp_path / "build")]) == 1
    error = capsys.readouterr().err
    assert error == f'error: {file}: decoding.branches: found "many", allowed: a valid integer\n'
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (None, r"decoding\.ngrams: .*table\.npz: not a table of n-grams \(.*\); python -m training\.ngrams makes one"),
        (5, r"decoding\.ngrams: found a table for 5 tokens, allowed: the target's 300"),
    ],
)
def test_a_table_of_ngrams_that_is_not_the_targets(pipeline, vocabulary, message):
    table = pipeline / "table.npz"
    if vocabulary:
        toys.ngrams(vocabulary).write(table)
    options = load(pipeline / "pipeline.yaml")
    options = options.model_copy(update={"decoding": options.decoding.model_copy(update={"ngrams": str(table)})})
    with pytest.raises(BuildError, match=message):
        build(options, pipeline / "build")
