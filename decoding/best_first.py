"""The tree of the most valuable nodes that several sources propose (docs/method.md §4).

A node's value is the probability that the target accepts it: the product of the probabilities along its path. It never rises
from parent to child, so the n most valuable nodes are a tree. In the host's memory a queue finds them one by one, which is
cheapest there. On a device, where a queue would wait for every node, the n best partial paths are kept depth by depth, and the
n best of all at the end: as many operations on arrays as there are depths.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_namespace

from decoding.coupling import Coupling
from decoding.engines import Array
from decoding.prefix_tree import PrefixTree
from decoding.sources import Option, Proposer, Row, Source

_likelihood = itemgetter(0)


@dataclass(frozen=True)
class Options:
    """What is proposed behind each of F paths: tokens, probabilities and origins, ``[B, F, W]``."""

    tokens: Array
    probabilities: Array
    origins: Array


def grow(
    anchors: Array,
    sources: Sequence[Any],
    nodes: int | list[int],
    factors: Any,
    least: float = 0.0,
    couplings: Sequence[Coupling | None] = (),
) -> PrefixTree:
    """The trees of the most valuable nodes, in the order of their values.

    Args:
        anchors: ``[B]`` int64. sources: one at least; in the host's memory any ``Proposer``, on a device ``Source``.
        nodes: N, the anchor among them; in the host's memory, of each tree.
        factors: ``[depths][origins]``, by which odds are corrected (``calibration``); on a device an array.
        least: in the host's memory, of a node's value. couplings: in the host's memory, of each sequence, if any.
    """
    if is_numpy_namespace(array_namespace(anchors)):
        each = [nodes] * len(anchors) if isinstance(nodes, int) else nodes
        return _by_queue(anchors, sources, each, factors, least, couplings or [None] * len(anchors))
    assert isinstance(nodes, int)
    return _by_depth(anchors, sources, nodes, factors)


def _by_queue(
    anchors: Array,
    sources: Sequence[Proposer],
    nodes: list[int],
    factors: Sequence[Sequence[float]],
    least: float,
    couplings: Sequence[Coupling | None],
) -> PrefixTree:
    grown = [
        _taken(anchor, [source.start(b) for source in sources], nodes[b], factors, least, couplings[b])
        for b, anchor in enumerate(anchors.tolist())
    ]
    counts = [len(nodes) for nodes in grown]
    shape = (len(grown), max(counts))
    tokens, depths, origins = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    parents, values = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    mask = np.zeros((*shape, shape[1]), dtype=np.bool_)
    for b, own in enumerate(grown):
        n = len(own)
        tokens[b, :n], parents[b, :n], depths[b, :n], values[b, :n], origins[b, :n] = zip(*own, strict=True)
        sees: list[list[bool]] = []
        for node, (_, parent, *_) in enumerate(own):
            sees.append(sees[parent].copy() if node else [False] * n)
            sees[node][node] = True
        mask[b, :n, :n] = sees
    return PrefixTree(tokens, parents, depths, mask, values, origins, counts, int(depths.max()))


def _taken(
    anchor: int,
    rows: list[Row],
    nodes: int,
    factors: Sequence[Sequence[float]],
    least: float,
    coupling: Coupling | None,
) -> list[tuple[int, int, int, float, int]]:
    """Token, parent, depth, value and origin of the most valuable nodes of one sequence, the anchor first.

    Of each node the best proposal behind it that was not taken lies in a heap. rows: of the sources, at the anchor.
    """
    taken = [(anchor, -1, 0, 1.0, 0)]
    heap: list[tuple[float, int, int, list[Option], list[Row]]] = []  # value, node, number of its option; its options, its rows
    while len(taken) < nodes:
        node = len(taken) - 1
        _, _, depth, value, _ = taken[node]
        options = _options(rows, depth + 1, factors, coupling)
        if options:
            heapq.heappush(heap, (-value * options[0][0], node, 0, options, rows))
        if not heap or heap[0][0] >= -least:
            break
        negative, parent, number, options, behind = heap[0]
        if number + 1 < len(options):
            further = -taken[parent][3] * options[number + 1][0]
            heapq.heapreplace(heap, (further, parent, number + 1, options, behind))
        else:
            heapq.heappop(heap)
        _, token, origin = options[number]
        taken.append((token, parent, taken[parent][2] + 1, -negative, origin))
        rows = [row.after(token) for row in behind]
    return taken


def _options(rows: list[Row], depth: int, factors: Sequence[Sequence[float]], coupling: Coupling | None) -> list[Option]:
    """What is proposed at a depth, likeliest first; joined as ``_joined`` does."""
    joined: list[Option] = []
    for row in rows:
        if not joined:
            joined = row.options
        elif row.options:
            theirs = {token: (p, origin) for p, token, origin in joined}
            both = []
            for p, token, origin in row.options:
                q, by = theirs.pop(token, (0.0, 0))
                both.append((1 - (1 - p) * (1 - q), token, origin | by))
            left = max(0.0, 1 - sum([p for p, _, _ in both]))
            joined = both + [(p * left, token, origin) for token, (p, origin) in theirs.items()]
    factor = factors[min(depth, len(factors) - 1)]
    corrected = [((odds := p * factor[by]) / (1 - p + odds), token, by) for p, token, by in joined]
    if coupling:
        corrected = [(coupling.coupled(p, depth, token), token, by) for p, token, by in corrected]
    corrected.sort(key=_likelihood, reverse=True)
    return corrected


def _by_depth(anchors: Array, sources: Sequence[Source], nodes: int, factors: Array) -> PrefixTree:
    xp = array_namespace(anchors)
    batch = anchors.shape[0]
    here = {"device": device(anchors)}
    states = [xp.zeros((batch, 1), dtype=xp.int64, **here) for _ in sources]
    value = xp.ones((batch, 1), dtype=xp.float32, **here)
    tokens, parents, depths, values, origins = [anchors[:, None]], [states[0] - 1], [0], [value + 1], [states[0]]
    start = 0  # the number of a depth's first node
    for depth in range(1, max(source.height for source in sources) + 1):
        options = _joined([_proposed(source, state) for source, state in zip(sources, states, strict=True)])
        width = options.tokens.shape[2]
        factor = factors[min(depth, factors.shape[0] - 1)]
        factor = xp.reshape(xp.take(factor, xp.reshape(options.origins, (-1,))), options.origins.shape)
        odds = options.probabilities * factor
        reached = xp.reshape(value[..., None] * odds / (1 - options.probabilities + odds), (batch, -1))
        best = xp.argsort(-reached, axis=-1, stable=True)[:, : max(nodes - 1, 1)]
        above = best // width
        value, token, origin = (
            _pick(x, best) for x in (reached, xp.reshape(options.tokens, (batch, -1)), xp.reshape(options.origins, (batch, -1)))
        )
        states = [_next(source, _pick(state, above), token) for source, state in zip(sources, states, strict=True)]
        tokens.append(token)
        parents.append(above + start)
        depths.append(depth)
        values.append(value)
        origins.append(origin)
        start += parents[-2].shape[1]
    return _chosen(tokens, parents, depths, values, origins, nodes)


def _chosen(
    tokens: list[Array], parents: list[Array], depths: list[int], values: list[Array], origins: list[Array], nodes: int
) -> PrefixTree:
    """The best of all nodes that were kept at some depth, as a tree."""
    xp = array_namespace(tokens[0])
    batch = tokens[0].shape[0]
    here = {"device": device(tokens[0])}
    value = xp.concat(values, axis=1)
    order = xp.argsort(-value, axis=-1, stable=True)  # stable: of equals the parent first
    number = xp.argsort(order, axis=-1)  # of each node, once it is sorted
    order = order[:, :nodes]
    value = _pick(value, order)
    real = value > 0
    depth = xp.concat(
        [xp.full((1, x.shape[1]), d, dtype=xp.int64, **here) for x, d in zip(tokens, depths, strict=True)], axis=1
    )
    parent = _pick(xp.concat(parents, axis=1), order)
    parent = xp.where(real & (parent >= 0), _pick(number, xp.where(parent < 0, 0, parent)), -1)
    places = xp.arange(order.shape[1], dtype=xp.int64, **here)
    # Ancestors by squaring: of 1 step, of up to 3, of up to 7, …
    path = xp.astype((parent[..., None] == places) | (places[:, None] == places), xp.float32)
    for _ in range(max(depths).bit_length()):
        path = xp.astype(xp.matmul(path, path) > 0, xp.float32)
    mask = (path > 0) & real[..., None]
    height = max(depths)
    return PrefixTree(
        tokens=xp.where(real, _pick(xp.concat(tokens, axis=1), order), 0),
        parents=parent,
        depths=xp.where(real, _pick(depth, order), 0),
        mask=mask,
        values=xp.where(value > 1, 1.0, value),
        origins=xp.where(real, _pick(xp.concat(origins, axis=1), order), 0),
        counts=[order.shape[1]] * batch,
        height=height,
    )


def _proposed(source: Source, states: Array) -> Options:
    """What a source proposes in the states ``[B, F]``."""
    rows = _rows(source, states)
    return Options(*(_gathered(x, rows, states) for x in (source.tokens, source.probabilities, source.origins)))


def _next(source: Source, states: Array, tokens: Array) -> Array:
    """The states ``[B, F]`` behind one token of each path."""
    xp = array_namespace(states)
    rows = _rows(source, states)
    own = _gathered(source.tokens, rows, states) == tokens[..., None]
    after = xp.max(xp.where(own, _gathered(source.after, rows, states), -1), axis=-1)
    return xp.where(after < 0, xp.reshape(xp.take(xp.reshape(source.otherwise, (-1,)), rows), states.shape), after)


def _joined(proposals: Sequence[Options]) -> Options:
    """One set of options from several: what two propose is likelier than either says, and what one proposes leaves less for
    what only others do."""
    xp = array_namespace(proposals[0].tokens)
    joined = proposals[0]
    for other in proposals[1:]:
        same = (other.tokens[..., :, None] == joined.tokens[..., None, :]) & (other.tokens[..., :, None] >= 0)
        theirs = xp.sum(xp.where(same, joined.probabilities[..., None, :], 0.0), axis=-1)
        both = 1 - (1 - other.probabilities) * (1 - theirs)
        left = 1 - xp.sum(both, axis=-1, keepdims=True)
        left = xp.where(left < 0, 0.0, left)
        said = xp.any(same, axis=-2)
        alone = xp.where(said, 0.0, joined.probabilities * left)
        origins = other.origins | xp.sum(xp.where(same, joined.origins[..., None, :], 0), axis=-1)
        joined = Options(
            xp.concat([other.tokens, xp.where(said, -1, joined.tokens)], axis=-1),
            xp.concat([both, alone], axis=-1),
            xp.concat([origins, joined.origins], axis=-1),
        )
    return joined


def _pick(x: Array, index: Array) -> Array:
    return array_namespace(x).take_along_axis(x, index, axis=1)


def _rows(source: Source, states: Array) -> Array:
    """The states, numbered through the batch, ``[B·F]``."""
    xp = array_namespace(states)
    batch, size = source.otherwise.shape
    base = xp.arange(batch, dtype=xp.int64, device=device(states)) * size
    return xp.reshape(base[:, None] + states, (-1,))


def _gathered(table: Array, rows: Array, states: Array) -> Array:
    """Rows of a table ``[B, S, A]``, ``[B, F, A]``."""
    xp = array_namespace(table)
    return xp.reshape(xp.take(xp.reshape(table, (-1, table.shape[2])), rows, axis=0), (*states.shape, table.shape[2]))
