"""The prefix tree: branches merged where they agree, so that no token is verified twice (docs/method.md §4)."""

from dataclasses import dataclass

from array_api_compat import array_namespace, device, is_numpy_namespace

from decoding.engines import Array


@dataclass(frozen=True)
class PrefixTree:
    """The trees of B sequences. Node 0 is the anchor, and a parent precedes its children.

    A tree of fewer than N nodes is filled up: token 0, parent -1, depth 0, nothing seen and seen by nothing.

    Attributes:
        tokens: ``[B, N]`` int64, of each node.
        parents: ``[B, N]`` int64, -1 for the anchor.
        depths: ``[B, N]`` int64, distance from the anchor.
        mask: ``[B, N, N]`` bool, node n sees its ancestors and itself.
        height: of the tallest tree that there can be.
    """

    tokens: Array
    parents: Array
    depths: Array
    mask: Array
    height: int


def merge(anchors: Array, branches: Array) -> PrefixTree:
    """Merge branches into trees: equal tokens under an equal prefix are one node.

    Nodes are numbered branch by branch, in the order in which they are met first. In the host's memory N is the size of the
    largest tree. How large a tree is that lies on a device only the device knows: N is then as many as there can be.

    Args:
        anchors: ``[B]`` int64. branches: ``[B, W, L]`` int64, the tokens behind the anchor; W is 1 at least, L may be 0.
    """
    xp = array_namespace(branches)
    batch, width, length = branches.shape
    here = {"device": device(branches), "dtype": xp.int64}

    def flat(x: Array) -> Array:
        return xp.reshape(x, (batch, width * length, *x.shape[3:]))

    # Place (j, d) is token d of branch j. Its node is made by the first branch that is the same up to there.
    same = xp.astype(branches[:, :, None] == branches[:, None], xp.int64)  # [B, W, W, L]
    maker = xp.argmax(xp.cumulative_prod(same, axis=-1), axis=2)  # [B, W, L]
    makes = flat(maker == xp.arange(width, **here)[:, None])
    number = xp.reshape(xp.cumulative_sum(xp.astype(makes, xp.int64), axis=-1), branches.shape)
    node = xp.take_along_axis(number, maker, axis=1)
    parent = xp.concat([xp.zeros_like(node[..., :1]), node], axis=-1)[..., :-1] if length else node

    most = width * length
    if is_numpy_namespace(xp):
        most = int(xp.max(xp.sum(makes, axis=-1)))
    order = xp.argsort(xp.astype(makes, xp.int64), axis=-1, descending=True, stable=True)[:, :most]
    real = xp.take_along_axis(makes, order, axis=-1)  # [B, N-1]

    def nodes(values: Array, filler: int) -> Array:
        """Of each node but the anchor."""
        return xp.where(real, xp.take_along_axis(values, order, axis=-1), filler)

    depths = xp.where(real, order % max(length, 1) + 1, 0)
    steps = node[..., None] == xp.arange(1 + most, **here)
    paths = flat(xp.cumulative_sum(xp.astype(steps, xp.int64), axis=2)) > 0  # [B, W·L, N], without the anchor
    mask = xp.zeros((batch, 1 + most, 1 + most), dtype=xp.bool, device=here["device"])
    mask[:, 1:] = xp.take_along_axis(paths, order[..., None], axis=1) & real[..., None]
    mask[:, 1:, 0] = real
    mask[:, 0, 0] = True
    top = xp.zeros((batch, 1), **here)
    return PrefixTree(
        tokens=xp.concat([anchors[:, None], nodes(flat(branches), 0)], axis=-1),
        parents=xp.concat([top - 1, nodes(flat(parent), -1)], axis=-1),
        depths=xp.concat([top, depths], axis=-1),
        mask=mask,
        height=length,
    )
