"""What training multiplies in."""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

TRIALS = 10  # of a product; the fastest counts


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices faster than f32 ones.

    A CPU that has the instructions may still take longer with them (docs/training.md), so that it is asked.
    """
    if device.type == "cuda":
        return True
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    return _seconds(torch.bfloat16, device) < _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """What a product of the size of a drafter's layer takes."""
    a, b = (torch.ones(rows, 576, dtype=dtype, device=device) for rows in (1024, 1536))
    taken = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        taken.append(time.perf_counter() - began)
    return min(taken)


def precision(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device multiplies it faster than f32."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bf16(device) else nullcontext()
