"""The prefix tree: branches merged where they agree, so that no token is verified twice (docs/method.md §4)."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class PrefixTree:
    """Nodes are numbered in the order in which they were added; node 0 is the anchor and a parent precedes its children.

    Attributes:
        tokens: the token of each node.
        parents: the parent of each node, -1 for the anchor.
        depths: distance of each node from the anchor.
        children: the node that holds a token below a node, by (node, token).
    """

    def __init__(self, anchor: int, branches: Iterable[Sequence[int]] = ()) -> None:
        self.tokens = [anchor]
        self.parents = [-1]
        self.depths = [0]
        self.children: dict[tuple[int, int], int] = {}
        for branch in branches:
            self.add(branch)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, branch: Sequence[int]) -> None:
        """Merge the tokens behind the anchor of one branch: equal tokens under an equal prefix are one node."""
        node = 0
        for token in branch:
            child = self.children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self.children[node, token] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(self.depths[node] + 1)
            node = child

    def mask(self) -> NDArray[np.bool_]:
        """Return ``[N, N]`` bool: node n sees its ancestors and itself."""
        mask = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            mask[node] |= mask[parent]
        return mask
