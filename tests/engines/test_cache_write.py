"""The cache-write kernel, in Triton's interpreter, against plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.cache_write import TILE, write_rows


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    d=st.sampled_from((8, 64, 80, 96, 128)),
    j=st.integers(0, TILE + 2),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_accepted_rows_are_written_behind_the_prefix(seed, d, j, dtype):
    g = torch.Generator().manual_seed(seed)
    layers, batch, heads, t, capacity = 2, 3, 2, TILE + 3, 40
    gap = torch.randn(layers, batch * heads * t * d + 5, generator=g).to(dtype)  # layers need not lie end to end
    new = gap[:, :-5].unflatten(1, (batch, heads, t, d))
    cache = torch.randn(layers, batch, heads, capacity, d, generator=g).to(dtype)
    rows = torch.stack([torch.randperm(t, generator=g)[:j] for _ in range(batch)])
    counts = torch.tensor([0, j, j // 2])
    lengths = torch.tensor([5, capacity - j, capacity - 3])  # the last one would run over the end
    expected = cache.clone()
    for b in range(batch):
        for k in range(int(counts[b])):
            if lengths[b] + k < capacity:
                expected[:, b, :, lengths[b] + k] = new[:, b, :, rows[b, k]]
    table = torch.cat([lengths[:, None], counts[:, None], rows], 1)
    write_rows(new, table[:, 2:], table[:, 1], table[:, 0], cache)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("rows", [0, 1])
def test_it_equals_the_hosts_way(rows):
    """``KVCache.write``, which every other runtime uses."""
    from engines.kv_cache import Buffer, KVCache
    from engines.tensorrt import DeviceKVCache

    new = [torch.randn(4, 2, 3, 9, 8)]
    written = []
    for kind in (KVCache, DeviceKVCache):
        cache = kind(2, 256, lambda sequences, capacity: [Buffer(torch.zeros(4, sequences, 3, capacity, 8), None)])
        cache.append(new, [range(5), []])
        cache.append(new, [[0, 3, 8][: 2 * rows], [2] * rows])
        assert cache.lengths.tolist() == [5 + 2 * rows, rows]
        written.append(cache.buffers[0].array)
    assert torch.equal(*written)
