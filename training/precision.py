"""What training multiplies in."""

from contextlib import AbstractContextManager, nullcontext

import torch


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices faster than f32 ones."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device multiplies it faster than f32."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bf16(device) else nullcontext()
