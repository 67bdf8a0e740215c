"""Engines by TensorRT-RTX, which builds them without a GPU: every binding, what is rebuilt, and what is refused."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from engines import tensorrt_library
from export.build import GRAPHS, build, main
from export.config import load
from export.tensorrt_build import TensorRTError, build_engine, profiles
from tests import tiny
from triton_repo import serve

ROOT = Path(__file__).resolve().parents[2]
FLOAT = {"f32": "FLOAT", "bf16": "BF16", "f16": "HALF"}


def compiled_pipeline(root, precision="auto"):
    file = tiny.save_pipeline(root)
    file.write_text(file.read_text().replace("precision: f32", f"precision: {precision}, backend: tensorrt_rtx"))
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("rtx")
    build(load(compiled_pipeline(root)), root / "build")
    return root


def record(root, graph):
    return json.loads((root / "build" / "engines" / graph / "graph.json").read_text())


def contract(graph, info, dtype):
    """The bindings of docs/method.md's graphs: mode, dtype and shape by name."""
    heads, dim = info["kv_heads"], info["head_dim"]
    given = {"positions": ("INT64", ["B", "T"]), "mask": ("BOOL", ["B", "N", "T"]), "past_lengths": ("INT64", ["B"])}
    if graph == "target":
        given["token_ids"] = given["positions"] = ("INT64", ["B", "N"])
        new = "N"
        made = {
            "logits": ("FLOAT", ["B", "N", info["vocabulary"]]),
            "features": ("FLOAT", ["B", "N", info["feature_width"]]),
        }
    else:
        given |= {"features": ("FLOAT", ["B", "M", info["feature_width"]]), "block_ids": ("INT64", ["B", "N"])}
        made, new = {"tokens": ("INT64", ["B", "N", 16]), "confidences": ("FLOAT", ["B", "N", 16])}, "M"
    for layer in range(info["layers"]):
        for kind in "kv":
            given[f"past_{kind}_{layer}"] = (dtype, ["B", heads, "C", dim])
            made[f"new_{kind}_{layer}"] = (dtype, ["B", heads, new, dim])
    return {
        name: {"mode": mode, "dtype": kind, "shape": shape}
        for mode, values in (("input", given), ("output", made))
        for name, (kind, shape) in values.items()
    }


def check(root, dtype, graphs=GRAPHS):
    for graph in graphs:
        found = record(root, graph)
        engine = root / "build" / "engines" / graph / "model.engine"
        assert found["engine"]["bindings"] == contract(graph, found["info"], dtype)
        assert found["engine"]["library"] == "tensorrt_rtx"
        assert engine.stat().st_size == found["engine"]["bytes"] > 10_000
        assert not list(engine.parent.glob("*.onnx*"))


def test_every_binding_is_as_the_contract_says(built):
    check(built, "BF16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_an_engine_computes_in_the_precision_asked_for(tmp_path, precision):
    build(load(compiled_pipeline(tmp_path, precision)), tmp_path / "build", only="second")
    found = record(tmp_path, "second")
    assert found["engine"]["bindings"] == contract("second", found["info"], FLOAT[precision])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_serving_them_without_a_gpu_says_so_before_any_work(built, capsys):
    assert serve.main([str(built / "build")]) == 1
    assert "tensorrt_rtx engines need an NVIDIA GPU and its driver" in capsys.readouterr().err


@pytest.mark.slow
def test_building_again_touches_nothing_and_a_limit_rebuilds(built, capsys):
    build(load(built / "pipeline.yaml"), built / "build")
    assert capsys.readouterr().out.count("up to date") == 3
    longer = built / "longer.yaml"
    longer.write_text((built / "pipeline.yaml").read_text().replace("length: 512", "length: 600"))
    before = record(built, "first")["engine"]
    build(load(longer), built / "build", only="first")
    after = record(built, "first")["engine"]
    assert (before["profiles"]["draft"]["C"], after["profiles"]["draft"]["C"]) == ([256, 512, 512], [256, 1024, 1024])


def test_profiles_cover_what_the_engines_are_called_with():
    target = profiles("target", block_size=8, branches=4, sequences=4, length=2048)
    assert {name: axes["N"] for name, axes in target.items()} == {
        "decode": (1, 1, 1),
        "verify": (1, 40, 40),  # 1 + (K + 1)(γ - 1) = 36 nodes at most, padded
        "prefill": (1, 128, 512),
    }
    assert all(axes["T"] == axes["N"] and axes["C"] == (256, 1024, 2048) for axes in target.values())
    assert target["verify"]["B"] == (1, 1, 4)
    second = profiles("second", block_size=8, branches=4, sequences=4, length=2048)
    assert second["redraft"] == {"B": (1, 1, 4), "C": (256, 1024, 2048), "N": (1, 32, 32), "M": (1, 4, 8), "T": (2, 36, 40)}
    assert second["catch_up"] == {
        "B": (1, 1, 4),
        "C": (256, 1024, 2048),
        "N": (1, 8, 32),
        "M": (1, 128, 512),
        "T": (2, 136, 544),
    }


@pytest.mark.parametrize(("backend", "hint"), [("tensorrt", "NVIDIA's Triton container"), ("tensorrt_rtx", "pip install")])
def test_a_missing_library_is_named_before_any_work(tmp_path, capsys, monkeypatch, backend, hint):
    monkeypatch.setitem(tensorrt_library.MODULES, backend, ("not_installed_anywhere",))
    file = tmp_path / "pipeline.yaml"
    file.write_text("target: {checkpoint: nowhere}\ndrafters: {first: nowhere, second: nowhere}\n")
    assert main([str(file), "--output", str(tmp_path / "build"), "--backend", backend]) == 1
    error = capsys.readouterr().err
    assert f"engine.backend: found {backend}, which is not installed here" in error
    assert hint in error
    assert not (tmp_path / "build").exists()


def test_a_graph_that_the_library_cannot_read_is_refused_with_its_reason(tmp_path):
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["B"]) for n in "xy"]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), path)
    with pytest.raises(TensorRTError, match=r"cannot read model\.onnx: NoSuchOperator"):
        build_engine("tensorrt_rtx", path, tmp_path / "engine", {}, tmp_path / "timings")


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_demos_engines(tmp_path, graph):
    pipeline = load(ROOT / "pipeline.yaml")
    engine = pipeline.engine.model_copy(update={"backend": "tensorrt_rtx"})
    build(pipeline.model_copy(update={"engine": engine}), tmp_path / "build", only=graph)
    check(tmp_path, "BF16", [graph])
