"""The acceptance walk: which drafted tokens the target would have said itself (docs/method.md §5)."""

from collections.abc import Callable

from decoding.prefix_tree import PrefixTree


def walk(tree: PrefixTree, choose: Callable[[int], int]) -> tuple[list[int], list[int]]:
    """Follow the target's own choices from the anchor down, as far as the tree holds them.

    Each token is chosen from the target's distribution at a node whose prefix the target chose itself, which is why
    the answer is the target's own, whatever was drafted.

    Args:
        tree: the verified tree.
        choose: the target's next token after a node. It is called once for each accepted node, in order.

    Returns:
        nodes: the accepted ones, the anchor first; the target's rows for them enter the cache.
        tokens: the committed ones, as many: those of the accepted nodes below the anchor, then the new anchor.
    """
    nodes, tokens = [0], [choose(0)]
    while (child := tree.children.get((nodes[-1], tokens[-1]))) is not None:
        nodes.append(child)
        tokens.append(choose(child))
    return nodes, tokens
