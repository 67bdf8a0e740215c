"""Trees and walks against a dictionary of prefixes; in NumPy's memory and in PyTorch's, which stands for a device's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from decoding.acceptance import GONE, walk
from decoding.prefix_tree import merge, stack

MEMORIES = [np.asarray, torch.asarray]
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 6))  # B, W, L
batches = shapes.flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 3)))


def prefixes(branches):
    """The distinct prefixes of a sequence's branches in the order in which they are met; the empty one is the anchor."""
    return list(dict.fromkeys([(), *(tuple(branch[:n]) for branch in branches.tolist() for n in range(1, len(branch) + 1))]))


@pytest.mark.parametrize("memory", MEMORIES)
@given(batch=batches)
def test_nodes_are_the_distinct_prefixes_and_see_their_own(memory, batch):
    size, width, length = batch.shape
    tree = merge(memory(np.arange(size) + 90), memory(batch))
    expected = [prefixes(branches) for branches in batch]
    n = tree.tokens.shape[1]
    # Never more rows than whole branches would take, and on the host no more than the largest tree.
    assert n == (max(map(len, expected)) if memory is np.asarray else 1 + width * length)
    assert n <= 1 + width * length
    assert tree.height == length
    for b, nodes in enumerate(expected):
        number = {prefix: node for node, prefix in enumerate(nodes)}
        count, mask = len(nodes), np.zeros((n, n), bool)
        for node, prefix in enumerate(nodes):
            assert int(tree.tokens[b, node]) == (prefix[-1] if prefix else 90 + b)
            assert int(tree.parents[b, node]) == (number[prefix[:-1]] if prefix else -1)
            assert int(tree.depths[b, node]) == len(prefix)
            mask[node, [number[prefix[:depth]] for depth in range(len(prefix) + 1)]] = True
        np.testing.assert_array_equal(np.asarray(tree.mask[b]), mask)
        for filler, value in ((tree.tokens, 0), (tree.parents, -1), (tree.depths, 0)):
            assert set(filler[b, count:].tolist()) <= {value}


@pytest.mark.parametrize("memory", MEMORIES)
@given(batch=batches, truth=st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_the_walk_commits_the_longest_match_and_one_more(memory, batch, truth):
    """Brute force: of all branches the one that agrees longest with what the target says."""
    size, _, length = batch.shape
    tree = merge(memory(np.arange(size) + 90), memory(batch))
    asked = []

    def choose(depth, nodes):
        asked.append(nodes.tolist())
        return memory(np.full(size, truth[depth]))

    nodes, tokens = walk(tree, choose)
    depth = nodes.shape[1]
    assert tuple(nodes.shape) == tuple(tokens.shape) == (size, depth)
    assert depth <= length + 1 if memory is np.asarray else depth == length + 1
    assert asked == np.asarray(nodes).T.tolist()
    for b, branches in enumerate(batch.tolist()):
        longest = max(len(list(_common(branch, truth))) for branch in branches)
        found = nodes[b].tolist()
        assert found[longest + 1 :] == [GONE] * (depth - 1 - longest)
        assert [int(tree.tokens[b, node]) for node in found[: longest + 1]] == [90 + b, *truth[:longest]]
        assert tokens[b, : longest + 1].tolist() == truth[: longest + 1]


def _common(a, b):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


@pytest.mark.parametrize("memory", MEMORIES)
@given(batch=batches, wanted=st.integers(1, 40))
def test_a_tree_alone_is_cut_as_among_others(memory, batch, wanted):
    """Alone there is nothing to fill up, and its arrays are cut; among others it is the one that is not the largest."""
    tree = merge(memory(np.array([90])), memory(batch[:1]))
    count = min(wanted, tree.counts[0])
    larger = merge(memory(np.array([91])), memory(np.arange(count + 1)[None, None]))
    alone, among = tree.first([count]), stack([tree, larger]).first([count, count + 1])
    assert alone.counts == [count] == among.counts[:1]
    for name in ("tokens", "parents", "depths", "values", "origins"):
        np.testing.assert_array_equal(np.asarray(getattr(alone, name)[0]), np.asarray(getattr(among, name)[0, :count]))
    np.testing.assert_array_equal(np.asarray(alone.mask[0]), np.asarray(among.mask[0, :count, :count]))
    assert max(alone.depths[0].tolist()) <= alone.height == min(tree.height, count - 1)
