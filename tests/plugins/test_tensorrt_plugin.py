"""What the TensorRT plugins answer when they are asked as by a build (``tensorrt_checks.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.cascade_attention import kernel
from tests.plugins.tensorrt_checks import BATCH, CAPACITY, HEADS, KV_HEADS, NODES, SHAPES, SIZE

ROOT = Path(__file__).resolve().parents[2]
GROUP = HEADS // KV_HEADS


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-m", "tests.plugins.tensorrt_checks"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # TensorRT's Python logs to stdout


@pytest.fixture(params=["BF16", "HALF"])
def answers(request, asked):
    return request.param, asked[request.param]


def cut():
    """How many stretches the kernel's own caller cuts such a prefix into."""
    return kernel.stretches(BATCH, KV_HEADS, -(-GROUP * NODES // 64), CAPACITY)


@pytest.mark.parametrize("form", ["whole", "states"])
def test_they_are_declared_as_the_operator_is(answers, form):
    _, plugins = answers
    outputs = {"whole": ["BF16|FP16"], "states": ["FP32", "FP32"]}[form]
    assert plugins[form]["inputs"] == list(SHAPES)
    assert plugins[form]["attributes"] == {"scale": "float"}
    assert plugins[form]["types"] == ["BF16|FP16"] * 5 + ["INT64", "BOOL", *outputs]


def test_merging_is_declared_as_its_node_is(answers):
    _, plugins = answers
    assert plugins["merge"]["inputs"] == ["outs", "lses"]
    assert plugins["merge"]["attributes"] == {"to": "int"}
    assert plugins["merge"]["types"] == ["FP32", "FP32", "BF16|FP16"]


def test_their_outputs_have_the_kernels_shapes(answers):
    dtype, plugins = answers
    shape, states = [BATCH, HEADS, NODES, SIZE], cut() + 1
    assert states == 5
    assert plugins["whole"]["outputs"] == plugins["merge"]["outputs"] == [[shape, dtype]]
    assert plugins["states"]["outputs"] == [[[states, *shape], "FLOAT"], [[states, *shape[:3]], "FLOAT"]]
    for plugin in plugins.values():  # TensorRT asks for types before it knows shapes
        assert plugin["output_types"] == [kind for _, kind in plugin["outputs"]]


@pytest.mark.parametrize(("form", "outputs"), [("whole", 1), ("states", 2)])
def test_attention_is_launched_as_the_kernel_wants(answers, form, outputs):
    _, plugins = answers
    for found, config in zip(plugins[form]["tactics"], kernel.configs(SIZE, 2, 90), strict=True):
        assert found["name"] == "attend"
        assert found["parameters"] == 7 + 3 + outputs  # the inputs; N, T, C; nothing that only Triton's launcher passes
        last = {"whole": 1, "states": cut() + 1}[form]
        assert found["grid"] == [-(-GROUP * NODES // config.tile), BATCH * KV_HEADS, last]
        assert found["threads"] == 32 * config.warps
        assert found["sizes"] == [NODES, NODES, CAPACITY]
        assert found["spilled"] == 0
        assert not found["file"]  # no path of the building machine in the engine


def test_merging_is_launched_as_the_kernel_wants(answers):
    _, plugins = answers
    (found,) = plugins["merge"]["tactics"]
    rows = BATCH * HEADS * NODES
    assert found["name"] == "merge"
    assert found["parameters"] == 2 + 3 + 1  # outs, lses; rows, states, N; out
    assert found["grid"] == [-(-rows // kernel.MERGED), 1, 1]
    assert found["sizes"] == [rows, cut() + 1, NODES]
    assert found["spilled"] == 0
    assert not found["file"]
