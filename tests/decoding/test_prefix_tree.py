import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from decoding.acceptance import walk
from decoding.prefix_tree import PrefixTree

branches = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=6)


@given(branches)
def test_nodes_are_the_distinct_prefixes(found):
    tree = PrefixTree(9, found)
    prefixes = {tuple(branch[:n]) for branch in found for n in range(1, len(branch) + 1)}
    assert len(tree) == 1 + len(prefixes)
    for branch in found:
        node = 0
        for token in branch:
            node = tree.children[node, token]
            assert tree.tokens[node] == token


@given(branches)
def test_the_mask_shows_each_node_its_path(found):
    tree = PrefixTree(9, found)
    mask = tree.mask()
    for node in range(len(tree)):
        path, step = {node}, node
        while (step := tree.parents[step]) >= 0:
            assert step < node
            path.add(step)
        assert set(np.flatnonzero(mask[node]).tolist()) == path
        assert tree.depths[node] == len(path) - 1


@given(branches, st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_the_walk_commits_the_longest_match_and_one_more(found, truth):
    """Brute force: of all branches the one that agrees longest with what the target says."""
    tree = PrefixTree(9, found)
    nodes, tokens = walk(tree, lambda node: truth[tree.depths[node]])
    longest = max((len([1 for _ in _common(branch, truth)]) for branch in found), default=0)
    assert tokens == truth[: longest + 1]
    assert [tree.tokens[node] for node in nodes] == [9, *truth[:longest]]


def _common(a, b):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x
