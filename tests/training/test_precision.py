"""What training multiplies in: what the CPU at hand multiplies faster, not what it has instructions for."""

import pytest
import torch

from training import precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unknown():
    precision.fast_bf16.cache_clear()
    yield
    precision.fast_bf16.cache_clear()


@pytest.mark.parametrize("slowdown", [0.5, 2.0])
def test_instructions_that_are_slow_are_not_taken(monkeypatch, slowdown):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "_seconds", lambda dtype, _: slowdown if dtype == torch.bfloat16 else 1.0)
    assert precision.fast_bf16(CPU) == (slowdown < 1)
    with precision.precision(CPU):
        assert torch.is_autocast_enabled("cpu") == (slowdown < 1)


def test_a_cpu_without_them_is_not_asked(monkeypatch):
    for found in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, found, lambda: False)
    monkeypatch.setattr(precision, "_seconds", lambda *_: pytest.fail("timed"))
    assert not precision.fast_bf16(CPU)


def test_a_gpu_is(monkeypatch):
    monkeypatch.setattr(precision, "_seconds", lambda *_: pytest.fail("timed"))
    assert precision.fast_bf16(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_timed(dtype):
    assert 0 < precision._seconds(dtype, CPU) < 5
