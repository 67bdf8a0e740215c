"""What the TensorRT plugin answers when it is asked as by a build (``tensorrt_checks.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.cascade_attention import kernel, op

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-m", "tests.plugins.tensorrt_checks"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # TensorRT's Python logs to stdout


def test_it_is_declared_as_the_operator_is(answers):
    names = ["q", "k_new", "v_new", "past_k", "past_v", "past_lengths", "mask"]
    assert answers["inputs"] == names
    assert answers["attributes"] == {"scale": "float"}
    assert answers["types"] == ["BF16|FP16"] * 5 + ["INT64", "BOOL", "BF16|FP16"]
    assert f"{op.DOMAIN}::{op.NAME}" == "d2sd::CascadeAttention"


@pytest.mark.parametrize("dtype", ["BF16", "HALF"])
def test_its_launches_fit_the_kernel(answers, dtype):
    assert answers["tactics"] == [1, 2]
    for tactic, config in zip(answers["tactics"], kernel.configs(128, 2, 90), strict=True):
        found = answers[f"{dtype} {tactic}"]
        assert found["output"] == [[3, 32, 48, 128], dtype]
        assert found["parameters"] == 7 + 3 + 1  # the inputs, N, T, C, the output; nothing that only Triton's launcher passes
        assert found["grid"] == [-(-4 * 48 // config.tile), 3 * 8, 1]
        assert found["threads"] == 32 * config.warps
        assert found["sizes"] == [48, 48, 4096]
        assert found["spilled"] == 0
        assert not found["file"]  # no path of the building machine in the engine
