"""The acceptance walk: which drafted tokens the target would have said itself (docs/method.md §5)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, is_numpy_namespace

from decoding.engines import Array
from decoding.prefix_tree import PrefixTree
from decoding.sequence import Sequence

GONE = -2  # where a walk has ended: no node, and no node's parent


@dataclass(frozen=True)
class Walk:
    """A sequence's way through its tree.

    Attributes:
        accepted: nodes, the anchor first. said: what was committed: fewer tokens where the answer ends among them.
        tokens, parents, depths, origins, values: of the tree's nodes (``PrefixTree``).
    """

    sequence: Sequence
    accepted: list[int]
    said: list[int]
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    origins: list[int]
    values: list[float]


def walk(tree: PrefixTree, choose: Callable[[int, Array], Array]) -> tuple[Array, Array]:
    """Follow the target's own choices from the anchors down, as far as the trees hold them.

    Each token is chosen from the target's distribution at a node whose prefix the target chose itself, which is why
    the answer is the target's own, whatever was drafted.

    Args:
        tree: the verified trees.
        choose: called with each depth and the nodes ``[B]`` that the walks have come to, below 0 where one has ended; returns
            the target's next tokens ``[B]``.

    Returns:
        nodes: ``[B, D]``, D = tree.height + 1, or less where the host sees that all have ended: the accepted ones, the anchor
            first, then ``GONE``. The target's rows for them enter the cache.
        tokens: ``[B, D]``: behind each node the committed one; void behind ``GONE``. The last is the new anchor.
    """
    xp = array_namespace(tree.tokens)
    if is_numpy_namespace(xp):
        return _on_host(tree, choose)
    node = xp.zeros_like(tree.tokens[:, 0])
    nodes, tokens = [], []
    for depth in range(tree.height + 1):
        token = choose(depth, node)
        nodes.append(node)
        tokens.append(token)
        if depth == tree.height:
            break
        child = (tree.parents == node[:, None]) & (tree.tokens == token[:, None])
        node = xp.where(xp.any(child, axis=-1), xp.argmax(xp.astype(child, xp.int64), axis=-1), GONE)
    return xp.stack(nodes, axis=1), xp.stack(tokens, axis=1)


def _on_host(tree: PrefixTree, choose: Callable[[int, Array], Array]) -> tuple[Array, Array]:
    """``walk`` where a look at a number costs less than an operation on arrays."""
    children = [
        {(parent, token): node for node, (parent, token) in enumerate(zip(*both, strict=True)) if parent >= 0}
        for both in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
    ]
    node = [0] * len(children)
    nodes, tokens = [], []
    for depth in range(tree.height + 1):
        token = choose(depth, np.array(node))
        nodes.append(node)
        tokens.append(token)
        node = [own.get(at, GONE) for own, at in zip(children, zip(node, token.tolist(), strict=True), strict=True)]
        if max(node) < 0:
            break
    return np.array(nodes).T, np.stack(tokens, axis=1)
