"""The GPU kernel, in Triton's interpreter, against the reference; and what compiling it ahead of time for GPUs gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.cascade_attention import kernel, reference
from tests.plugins.test_cascade_attention import inputs

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cast(arguments, dtype):
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def check(arguments, dtype, **options):
    """Both forms of the kernel on rounded inputs against the reference in f32 on the same inputs."""
    arguments = cast(arguments, dtype)
    expected = reference.cascade_attention(
        *cast(arguments, torch.float32), window=options.get("window"), sinks=options.get("sinks")
    )
    for whole in (True, False):
        found = kernel.cascade_attention(*arguments, **options, whole=whole)
        assert found.dtype == dtype
        assert found.isfinite().all()
        error = (found.float() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < (1e-5 if dtype == torch.float32 else 5e-3), (whole, float(error))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    n=st.integers(1, 19),
    t=st.integers(1, 37),
    capacity=st.sampled_from([1, 7, 64, 129, 300]),
    d=st.sampled_from(kernel.HEAD_SIZES),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, 1, 5, 100]),
    with_sinks=st.booleans(),
)
def test_kernel_equals_reference(seed, batch, kv_heads, group, n, t, capacity, d, dtype, window, with_sinks):
    arguments = inputs(seed, batch, kv_heads, group, n, t, capacity, d)
    sinks = torch.randn(kv_heads * group, generator=torch.Generator().manual_seed(seed)) if with_sinks else None
    check(arguments, dtype, window=window, sinks=sinks)


@pytest.mark.parametrize(("group", "n", "capacity"), [(4, 80, 520), (8, 1, 1024), (3, 16, 96)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernel_on_real_trees(group, n, capacity, dtype):
    """More rows than a tile, prefixes of many blocks: the larger configuration and the cut prefix."""
    arguments = list(inputs(2, 2, 1, group, n, n, capacity, 128))
    arguments[5] = torch.tensor([capacity, capacity // 3])
    arguments[6] = torch.tril(torch.rand(2, n, n) > 0.6) | torch.eye(n, dtype=torch.bool)
    check(arguments, dtype)


def test_every_configuration_gives_the_same():
    arguments = inputs(4, 2, 2, 3, 30, 30, 200, 64)
    expected = reference.cascade_attention(*arguments)
    for capability in (86, 90):
        for itemsize in (2, 4):
            for config in kernel.configs(64, itemsize, capability):
                torch.testing.assert_close(kernel.cascade_attention(*arguments, config=config), expected, atol=1e-5, rtol=1e-4)


def test_nothing_beyond_the_prefix_is_read():
    arguments = list(inputs(4, 2, 2, 2, 5, 5, 130, 64))
    arguments[5] = torch.tensor([70, 0])
    expected = reference.cascade_attention(*arguments)
    for buffer in arguments[3:5]:
        for b, length in enumerate(arguments[5].tolist()):
            buffer[b, :, length:] = torch.nan
    for whole in (True, False):
        torch.testing.assert_close(kernel.cascade_attention(*arguments, whole=whole), expected, atol=1e-5, rtol=1e-4)


def test_a_query_that_sees_nothing_gives_zero():
    arguments = list(inputs(1, 2, 1, 2, 5, 7, 9, 64))
    arguments[5][:], arguments[6][:] = 0, False
    for whole in (True, False):
        for sinks in (None, torch.zeros(2)):
            assert not kernel.cascade_attention(*arguments, sinks=sinks, whole=whole).any()


def test_a_repeated_call_gives_the_same_bits():
    arguments = cast(inputs(8, 1, 2, 4, 20, 20, 400, 64), torch.bfloat16)
    assert torch.equal(*(kernel.cascade_attention(*arguments, whole=False) for _ in range(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0].transpose(0, 1).contiguous().transpose(0, 1), *a[1:]], "q: found strides"),
        (lambda a: [x[..., :60].contiguous() if isinstance(x, torch.Tensor) and x.ndim == 4 else x for x in a], "head size 60"),
    ],
)
def test_what_it_cannot_take_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernel.cascade_attention(*change(list(inputs(1, 2, 1, 2, 5, 5, 9, 64))))


CASES = [  # arguments, capabilities and head sizes; every head size on sm_90, one on the other GPUs
    pytest.param(["--capability", "90", "--head-size", "128"], {90}, {128}, id="sm_90-128"),
    pytest.param(["--capability", "90"], {90}, {*kernel.HEAD_SIZES}, id="sm_90", marks=pytest.mark.slow),
    pytest.param(
        ["--capability", "80", "86", "89", "100", "120", "--head-size", "128"],
        {80, 86, 89, 100, 120},
        {128},
        id="others",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("options", "capabilities", "head_sizes"), CASES)
def test_it_compiles_and_spills_nothing_on_sm_90(tmp_path, options, capabilities, head_sizes):
    """By what ptxas reports; a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache")
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_kernels.py"), "--dtype", "bfloat16", *options]
    command += ["--json", str(tmp_path / "rows.json")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    compiled = json.loads((tmp_path / "rows.json").read_text())
    assert {row["capability"] for row in compiled} == capabilities
    assert {row["head_size"] for row in compiled} == head_sizes
    for row in compiled:
        limit = 227 if row["capability"] in (90, 100) else 99
        assert row["shared"] <= limit * 1024, row
        assert row["spilled"] <= (0 if row["capability"] == 90 else 16), row
