"""The prefix tree: branches merged where they agree, so that no token is verified twice (docs/method.md §4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
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
        values: ``[B, N]`` f32, the probability that the target accepts each node; 0 where nobody says.
        origins: ``[B, N]`` int64, who proposed it (``sources.ORIGINS``); 0 where nobody says.
        counts: nodes of each tree, its first ones; N where only a device knows.
        height: of the tallest tree that there can be.
    """

    tokens: Array
    parents: Array
    depths: Array
    mask: Array
    values: Array
    origins: Array
    counts: list[int]
    height: int

    def of(self, rows: Sequence[int]) -> "PrefixTree":
        """The trees of some of the sequences."""
        if list(rows) == list(range(len(self.counts))):
            return self
        xp = array_namespace(self.tokens)
        taken = self.mapped(lambda x: xp.stack([x[b] for b in rows]))
        return replace(taken, counts=[self.counts[b] for b in rows])

    def first(self, counts: list[int]) -> "PrefixTree":
        """The first nodes of each tree, which have their ancestors among them."""
        if counts == self.counts:
            return self
        xp = array_namespace(self.tokens)
        most = max(counts)
        if len(counts) == 1 and most <= self.counts[0]:  # nothing to fill up
            cut = self.mapped(lambda x: x[:, :most])
            return replace(cut, mask=cut.mask[:, :, :most], counts=counts, height=min(self.height, most - 1))
        places = xp.arange(most, dtype=xp.int64, device=device(self.tokens))
        # The host's numbers reach a device as part of an operation, which it does not wait for.
        here = xp.stack([places < count for count in counts])
        return PrefixTree(
            tokens=xp.where(here, self.tokens[:, :most], 0),
            parents=xp.where(here, self.parents[:, :most], -1),
            depths=xp.where(here, self.depths[:, :most], 0),
            mask=self.mask[:, :most, :most] & here[..., None],
            values=xp.where(here, self.values[:, :most], 0.0),
            origins=xp.where(here, self.origins[:, :most], 0),
            counts=[min(count, own) for count, own in zip(counts, self.counts, strict=True)],
            height=min(self.height, most - 1),
        )

    def mapped(self, change: Callable[[Array], Array]) -> "PrefixTree":
        """With each of the arrays changed."""
        arrays = (self.tokens, self.parents, self.depths, self.mask, self.values, self.origins)
        tokens, parents, depths, mask, values, origins = map(change, arrays)
        return PrefixTree(tokens, parents, depths, mask, values, origins, self.counts, self.height)


def chain(tokens: Sequence[int]) -> PrefixTree:
    """A tree without a fork, in the host's memory."""
    n = len(tokens)
    places = np.arange(n)[None]
    mask, values = np.tri(n, dtype=np.bool_)[None], np.zeros((1, n), dtype=np.float32)
    return PrefixTree(np.array([tokens]), places - 1, places, mask, values, np.zeros_like(places), [n], n - 1)


def stack(trees: Sequence[PrefixTree]) -> PrefixTree:
    """All trees as one array; they lie in one memory."""
    if len(trees) == 1:
        return trees[0]
    xp = array_namespace(trees[0].tokens)
    most = max(tree.tokens.shape[1] for tree in trees)

    def filled(x: Array, filler: float) -> Array:
        """Fillers behind the last node, of the axes of nodes."""
        for axis in range(1, x.ndim):
            shape = list(x.shape)
            shape[axis] = most - shape[axis]
            x = xp.concat([x, xp.full(shape, filler, dtype=x.dtype, device=device(x))], axis=axis)
        return x

    return PrefixTree(
        tokens=xp.concat([filled(tree.tokens, 0) for tree in trees]),
        parents=xp.concat([filled(tree.parents, -1) for tree in trees]),
        depths=xp.concat([filled(tree.depths, 0) for tree in trees]),
        mask=xp.concat([filled(tree.mask, False) for tree in trees]),
        values=xp.concat([filled(tree.values, 0.0) for tree in trees]),
        origins=xp.concat([filled(tree.origins, 0) for tree in trees]),
        counts=[count for tree in trees for count in tree.counts],
        height=max(tree.height for tree in trees),
    )


def merge(anchors: Array, branches: Array, origins: tuple[int, int] = (0, 0)) -> PrefixTree:
    """Merge branches into trees: equal tokens under an equal prefix are one node.

    Nodes are numbered branch by branch, in the order in which they are met first. In the host's memory N is the size of the
    largest tree. How large a tree is that lies on a device only the device knows: N is then as many as there can be.

    Args:
        anchors: ``[B]`` int64. branches: ``[B, W, L]`` int64, the tokens behind the anchor; W is 1 at least, L may be 0.
        origins: of the first branch, and of what only others hold.
    """
    xp = array_namespace(branches)
    batch, width, length = branches.shape
    here = {"device": device(branches), "dtype": xp.int64}
    top = xp.zeros((batch, 1), **here)
    if not length:
        seen, unsaid = xp.ones((batch, 1, 1), dtype=xp.bool, device=here["device"]), xp.astype(top, xp.float32)
        return PrefixTree(anchors[:, None], top - 1, top, seen, unsaid, top, [1] * batch, 0)

    def flat(x: Array) -> Array:
        return xp.reshape(x, (batch, width * length, *x.shape[3:]))

    # Place (j, d) is token d of branch j. Its node is made by the first branch that is the same up to there.
    same = xp.astype(branches[:, :, None] == branches[:, None], xp.int64)  # [B, W, W, L]
    maker = xp.argmax(xp.cumulative_prod(same, axis=-1), axis=2)  # [B, W, L]
    makes = flat(maker == xp.arange(width, **here)[:, None])
    number = xp.reshape(xp.cumulative_sum(xp.astype(makes, xp.int64), axis=-1), branches.shape)
    node = xp.take_along_axis(number, maker, axis=1)
    parent = xp.concat([xp.zeros_like(node[..., :1]), node], axis=-1)[..., :-1]

    most, counts = width * length, [1 + width * length] * batch
    if is_numpy_namespace(xp):
        counts = (1 + xp.sum(makes, axis=-1)).tolist()
        most = max(counts) - 1
    order = xp.argsort(xp.astype(makes, xp.int64), axis=-1, descending=True, stable=True)[:, :most]
    real = xp.take_along_axis(makes, order, axis=-1)  # [B, N-1]

    def nodes(values: Array, filler: int) -> Array:
        """Of each node but the anchor."""
        return xp.where(real, xp.take_along_axis(values, order, axis=-1), filler)

    depths = xp.where(real, order % length + 1, 0)
    steps = node[..., None] == xp.arange(1 + most, **here)
    paths = flat(xp.cumulative_sum(xp.astype(steps, xp.int64), axis=2)) > 0  # [B, W·L, N], without the anchor
    mask = xp.zeros((batch, 1 + most, 1 + most), dtype=xp.bool, device=here["device"])
    mask[:, 1:] = xp.take_along_axis(paths, order[..., None], axis=1) & real[..., None]
    mask[:, 1:, 0] = real
    mask[:, 0, 0] = True
    return PrefixTree(
        tokens=xp.concat([anchors[:, None], nodes(flat(branches), 0)], axis=-1),
        parents=xp.concat([top - 1, nodes(flat(parent), -1)], axis=-1),
        depths=xp.concat([top, depths], axis=-1),
        mask=mask,
        values=xp.zeros((batch, 1 + most), dtype=xp.float32, device=here["device"]),
        origins=xp.concat([top, nodes(flat(xp.where(maker == 0, *origins)), 0)], axis=-1),
        counts=counts,
        height=length,
    )
