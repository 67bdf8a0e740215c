"""The ways that the kernel is timed beside compute the same as the reference: else the comparison would say nothing."""

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import GAMMA, Heads, K
from plugins.cascade_attention import reference

HEADS = Heads("small", 4, 2, 64)


@pytest.mark.parametrize("way", ["masked_sdpa", pytest.param("flex", marks=pytest.mark.slow)])
def test_one_piece_of_keys(way):
    arguments = gpu_check.in_f32(gpu_check.inputs(HEADS, 2, 16, 128, "cpu"))
    found = getattr(gpu_check, way)(*arguments)()
    torch.testing.assert_close(found, reference.cascade_attention(*arguments), atol=1e-5, rtol=1e-4)


def test_whole_branches():
    """As a tree of K + 1 chains."""
    torch.manual_seed(0)
    q, keys, values, new_k, new_v = gpu_check.in_f32(gpu_check.whole_branches(HEADS, 2, 128, "cpu"))
    mask = torch.block_diag(*[torch.ones(GAMMA, GAMMA).tril()] * (K + 1)).bool()
    joined = (x.unflatten(0, (2, K + 1)).transpose(1, 2).flatten(2, 3) for x in (new_k, new_v))
    prefix = (x.repeat_interleave(HEADS.query // HEADS.kv, 1) for x in (keys, values))
    lengths = torch.tensor([128, 128])
    expected = reference.cascade_attention(q, *joined, *prefix, lengths, mask.expand(2, -1, -1), HEADS.size**-0.5)
    torch.testing.assert_close(gpu_check.branches(q, keys, values, new_k, new_v)(), expected, atol=1e-5, rtol=1e-4)
