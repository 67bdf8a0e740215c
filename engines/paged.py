"""Models whose KV caches are blocks of a pool: the target and the drafters over a graph that takes rows of many sequences.

A call costs what its rows cost: those of all sequences lie in one row, and attention reads the blocks in use. What a sequence
has begun with is shared: a block whose tokens, and all before them, another sequence had too is not computed again. The pool
follows vLLM's PagedAttention (arXiv 2309.06180).
"""

import itertools
import operator
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines import sampling
from engines.engine import Bools, EngineError, Features, Floats, GraphInfo, Ints

BLOCK = 32  # rows; what OpenVINO's operator takes
ALONE = np.ones((1, 1), bool)  # the mask of a sequence of one row
SCRATCH = 256  # rows of a sequence beyond its tokens, at least, which a call makes and nobody keeps

Key = tuple[int, tuple[int, ...]]  # the number of the block before, or 0, and the tokens of this one


class BlockPool:
    """Which block belongs to whom.

    Attributes:
        hits: rows that sequences began with because another had computed them. asked: rows that they could have had so.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free = list(reversed(range(blocks)))
        self.users = [0] * blocks
        self.known: dict[Key, tuple[int, int]] = {}  # a number of its own, and the block
        self.keys: dict[int, Key] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # known blocks that nobody uses, those used longest ago first
        self.numbers = 0
        self.hits = self.asked = 0

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self, count: int) -> list[int]:
        """Blocks for one user.

        Raises:
            EngineError: there are fewer.
        """
        if count > self.available:
            raise EngineError(f"the KV cache is full: {count} blocks of {BLOCK} tokens are needed, {self.available} are free")
        taken = []
        for _ in range(count):
            if self.free:
                block = self.free.pop()
            else:
                block, _ = self.idle.popitem(last=False)
                del self.known[self.keys.pop(block)]
            self.users[block] = 1
            taken.append(block)
        return taken

    def share(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The blocks that hold the beginning of these tokens, and the last one's number (0: none). Never all tokens: the
        last has to be run."""
        found, number = [], 0
        whole = (len(tokens) - 1) // BLOCK
        for i in range(whole):
            entry = self.known.get((number, tuple(tokens[i * BLOCK : (i + 1) * BLOCK])))
            if entry is None:
                break
            number, block = entry
            self.users[block] += 1
            self.idle.pop(block, None)
            found.append(block)
        self.asked += whole * BLOCK
        self.hits += len(found) * BLOCK
        return found, number

    def learn(self, block: int, before: int, tokens: Sequence[int]) -> int:
        """A block is full and will not change. Returns its number."""
        key = (before, tuple(tokens))
        if key not in self.known:
            self.numbers += 1
            self.known[key], self.keys[block] = (self.numbers, block), key
        return self.known[key][0]

    def release(self, blocks: Sequence[int]) -> None:
        """A user is done with blocks; the last ones are forgotten first."""
        for block in reversed(blocks):
            self.users[block] -= 1
            if self.users[block]:
                continue
            if block in self.keys:
                self.idle[block] = None
            else:
                self.free.append(block)


@dataclass(eq=False)
class Held:
    """What an engine holds of a sequence.

    Attributes:
        tokens: its owner's. table: its blocks. length: rows in use. learned: full blocks that the pool knows, the last one
            by ``number``.
    """

    tokens: list[int]
    table: list[int]
    length: int
    learned: int
    number: int = field(default=0)


class Graph(Protocol):
    """A compiled graph with the memory of its pool."""

    info: GraphInfo
    runtime: str
    forms: Sequence[tuple[int, int]]  # rows of tokens or features, and of blocks, that have a form of their own; rising
    cache: NDArray  # [2·layers, blocks, Hkv, BLOCK, D], K and V of layer 0, of layer 1, …; the last block is no sequence's

    def prepare(self) -> None:
        """Do at once what calls would else do when they are first made."""

    def fit(self, rows: int) -> int:
        """How many rows a call of so many had better have; more of them come at the end, and mean nothing."""

    def move(self, block: Sequence[int], place: Sequence[int], to_block: Sequence[int], to_place: Sequence[int]) -> None:
        """Copy K/V of rows (``kept.move``)."""

    def run(self, inputs: dict[str, NDArray]) -> dict[str, NDArray]:
        """Run over rows; K/V of all of them are written behind what their sequences hold. The next run overwrites the
        outputs."""


class Paged:
    """Sequences over a graph's pool of blocks. Method contracts: ``decoding/engines.py``.

    Args:
        scratch: rows that a call can make of a sequence and nobody keeps (``scratch_rows``).
    """

    def __init__(self, graph: Graph, scratch: int = SCRATCH) -> None:
        self.graph, self.runtime, self.prepare, self.scratch = graph, graph.runtime, graph.prepare, scratch
        self.opened = 0  # a number is never given twice
        self.reset()

    @property
    def used(self) -> float:
        return 1 - self.pool.available / self.pool.blocks

    def room(self, rows: int) -> bool:
        return sequence_blocks(rows, self.scratch) <= self.pool.available

    def open(self, tokens: list[int], rows: int, fresh: bool = False) -> int:
        shared, number = self.pool.share([] if fresh else tokens)
        try:
            own = self.pool.take(max(0, sequence_blocks(rows, self.scratch) - len(shared)))
        except EngineError:
            self.pool.release(shared)
            raise
        self.opened += 1
        self.held[self.opened] = Held(tokens, shared + own, len(shared) * BLOCK, len(shared), number)
        return self.opened

    def length(self, sequence: int) -> int:
        return self.held[sequence].length

    def close(self, sequence: int) -> None:
        self.pool.release(self.held.pop(sequence).table)

    def reset(self) -> None:
        self.spare = self.graph.cache.shape[1] - 1
        self.pool = BlockPool(self.spare)
        self.held: dict[int, Held] = {}

    def send(self, array: NDArray) -> NDArray:
        return array

    def read(self, array: NDArray) -> NDArray:
        return array

    def layout(self, held: Sequence[Held], rows: Sequence[int], masks: Sequence[Bools], more: int) -> dict[str, NDArray]:
        """Where the rows of a call belong.

        Args:
            rows: of each sequence. masks: ``[n, n]`` each, which of its own rows a row sees; none sees a later one.
            more: rows behind them that fill the call up: each a sequence of its own, without a past, in a block that is
                nobody's. (Where every sequence has one row, the operator is quicker.)
        """
        for one, count in zip(held, rows, strict=True):
            missing = _blocks(one.length + count) - len(one.table)
            if missing > 0:
                one.table += self.pool.take(missing)
        tables = [one.table[: _blocks(one.length + count)] for one, count in zip(held, rows, strict=True)]
        lengths = [*(one.length for one in held), *[0] * more]
        rows, masks, tables = [*rows, *[1] * more], [*masks, *[ALONE] * more], [*tables, *[[self.spare]] * more]
        return {
            "past_lens": np.array(lengths, np.int32),
            "subsequence_begins": _begins(rows),
            "block_indices": np.array([block for table in tables for block in table], np.int32),
            "block_indices_begins": _begins([len(table) for table in tables]),
            "max_context_len": np.array(max(map(operator.add, lengths, rows)), np.int32),
            "qq_bias": np.concatenate([mask.reshape(-1) for mask in masks]).view(np.uint8),
            "qq_bias_begins": _begins([mask.size for mask in masks]),
        }

    def grow(self, one: Held, rows: int) -> None:
        """Count rows in; blocks that are full now are there for others who begin so."""
        one.length += rows
        while (one.learned + 1) * BLOCK <= one.length:
            start = one.learned * BLOCK
            one.number = self.pool.learn(one.table[one.learned], one.number, one.tokens[start : start + BLOCK])
            one.learned += 1

    def places(self, one: Held, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Block and place in it of a sequence's rows."""
        return [one.table[row // BLOCK] for row in rows], [row % BLOCK for row in rows]


class RaggedPass:
    """A pass of the target whose rows lie one behind the other: logits ``[R, V]``, those of sequence b from ``starts[b]``."""

    def __init__(self, logits: Floats, starts: NDArray[np.int64]) -> None:
        self.logits, self.starts = logits, starts

    def choose(self, nodes: Ints, how: Sequence[sampling.Sampling], uniforms: NDArray[np.float64]) -> Ints:
        chosen = np.zeros_like(nodes)
        for b, node in enumerate(nodes):
            if node >= 0:
                chosen[b] = sampling.choose(self.logits[self.starts[b] + node], how[b], uniforms[b])
        return chosen

    def log_probabilities(
        self, row: int, nodes: Sequence[int], tokens: Sequence[int], top: int
    ) -> tuple[NDArray[np.float64], Ints, NDArray[np.float64]]:
        logits = self.logits[self.starts[row] + np.array(nodes, dtype=np.int64)]
        return sampling.log_probabilities(logits, np.array(tokens, dtype=np.int64), top)


class PagedTarget(Paged):
    """The target over a pool of blocks; the features of its tokens lie in blocks of the same number."""

    ragged = True

    def __init__(self, graph: Graph, scratch: int = SCRATCH) -> None:
        super().__init__(graph, scratch)
        self.fit = graph.fit
        self.rows = np.zeros((graph.cache.shape[1], BLOCK, graph.info.feature_width), np.float32)

    def forward(
        self,
        sequences: Sequence[int],
        token_ids: Ints,
        positions: Ints,
        mask: Bools,
        counts: Sequence[int],
        silent: int = 0,
    ) -> RaggedPass:
        held = [self.held[sequence] for sequence in sequences]
        starts = _begins(counts)
        total, speaking = int(starts[-1]), int(starts[len(counts) - silent])
        more = self.graph.fit(total) - total
        masks = [own[:n, :n] for own, n in zip(mask, counts, strict=True)]
        inputs = self.layout(held, counts, masks, more)
        inputs["token_ids"] = _row([row[:n] for row, n in zip(token_ids, counts, strict=True)], more)
        inputs["positions"] = _row([row[:n] for row, n in zip(positions, counts, strict=True)], more)
        inputs["asked"] = np.arange(max(speaking, 1) if silent else total + more)
        made = self.graph.run(inputs)
        self._last, self._starts, self._features = held, starts, made["features"][0]
        return RaggedPass(made["logits"][0], starts.astype(np.int64))

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """K/V of accepted rows move up to where they belong; what lies behind them is written over by the next call."""
        moved: list[tuple[int, ...]] = []  # of a row: block and place where it is, and where it belongs
        for one, chosen, start in zip(self._last, rows, self._starts[:-1].tolist(), strict=True):
            if not len(chosen):
                continue
            there = self.places(one, range(one.length, one.length + len(chosen)))
            self.rows[there] = self._features[[start + node for node in chosen]]
            if chosen[-1] != len(chosen) - 1:
                moved += zip(*self.places(one, [one.length + node for node in chosen]), *there, strict=True)
        if moved:
            self.graph.move(*map(list, zip(*moved, strict=True)))
        for one, chosen in zip(self._last, rows, strict=True):
            self.grow(one, len(chosen))

    def features(self, sequence: int, start: int, stop: int) -> Features:
        return self.rows[self.places(self.held[sequence], range(start, stop))]


class PagedDrafter(Paged):
    """A drafter over a pool of blocks.

    The operator's queries see no later row, but a block's tokens see each other both ways. So the rows of a call are, of each
    sequence: its features; its block, whose K/V are there to be seen; and its block again, whose queries see them.
    """

    @property
    def mask_id(self) -> int:
        return self.graph.info.mask_id

    @property
    def least(self) -> int:
        """Rows of features that a call has at least, filled up."""
        return self.graph.fit(1)

    def fit(self, rows: int) -> int:
        """How many rows a call of so many of features and blocks is filled up to."""
        return next((sum(form) for form in self.graph.forms if sum(form) >= rows), self.graph.fit(rows))

    def forward(
        self, sequences: Sequence[int], features: Sequence[Features], block_ids: Ints, positions: Ints, mask: Bools
    ) -> tuple[Ints, Floats]:
        held = [self.held[sequence] for sequence in sequences]
        batch, n = block_ids.shape
        new = [len(own) for own in features]
        total = self.graph.fit(max(sum(new), 1))  # a graph is never given nothing
        more = total - sum(new)
        rows = np.zeros((1, total, self.graph.info.feature_width), np.float32)
        if sum(new):
            np.concatenate(features, out=rows[0, : sum(new)])
        blocks = block_ids.reshape(1, -1) if n else np.full((1, 1), self.mask_id)
        committed = [one.length + np.arange(m) for one, m in zip(held, new, strict=True)]
        at = np.concatenate([*committed, np.zeros(more, np.int64), positions.reshape(-1) if n else np.zeros(1, np.int64)])
        key, query, out = [], [], []
        begin = 0
        for b, m in enumerate(new):
            before, own = sum(new[:b]), np.arange(n) + b * n
            key += [np.arange(m) + before, own + total, own + total]
            query += [np.zeros(m + n, np.int64), own]
            out.append(np.arange(n) + begin + m + n)
            begin += m + 2 * n
        counts = [m + 2 * n for m in new]
        masks = [_twice(m, own) for m, own in zip(new, mask, strict=True)]
        inputs = self.layout(held, counts, masks, more)
        inputs |= {"features": rows, "block_ids": blocks, "positions": at[None]}
        inputs |= {"key_rows": _row(key, more)[0], "query_rows": _row(query, more)[0]}
        inputs["out_rows"] = np.concatenate(out) if n else np.zeros(1, np.int64)
        made = self.graph.run(inputs)
        for one, m in zip(held, new, strict=True):
            self.grow(one, m)
        width = made["tokens"].shape[-1]
        if not n:
            return np.zeros((batch, 0, width), np.int64), np.zeros((batch, 0, width), np.float32)
        return made["tokens"].reshape(batch, n, width), made["confidences"].reshape(batch, n, width)


def _twice(features: int, mask: Bools) -> Bools:
    """``[m + 2n, m + 2n]``: the block's second rows see the features and, as the mask says, its first rows. Nothing is asked of
    the others: they see none."""
    n = len(mask)
    sees = np.zeros((features + 2 * n,) * 2, bool)
    sees[features + n :, :features] = True
    sees[features + n :, features : features + n] = mask
    return sees


def _row(parts: Sequence[NDArray[np.int64]], more: int) -> NDArray[np.int64]:
    """``[1, R]``: parts one behind the other, and as many zeros as are wanted."""
    return np.concatenate([*parts, np.zeros(more, np.int64)])[None]


def scratch_rows(block_size: int, branches: int) -> int:
    """Rows of a call that nobody keeps, at most: K branches of γ tokens, which a drafter is given twice."""
    return max(SCRATCH, 2 * block_size * branches)


def sequence_blocks(rows: int, scratch: int = SCRATCH) -> int:
    """That a sequence of up to so many tokens takes. scratch: rows that a call can make of it beyond these."""
    return _blocks(rows) + _blocks(scratch)


def block_bytes(info: GraphInfo, number: int) -> int:
    """Of a block in the pool of a graph, the features of a target's tokens among them. number: bytes of a number of K/V."""
    features = info.feature_width if info.mask_id < 0 else 0
    return BLOCK * (2 * number * info.layers * info.kv_heads * info.head_dim + 4 * features)


def _blocks(rows: int) -> int:
    """That hold so many rows."""
    return -(-rows // BLOCK)


def _begins(sizes: Sequence[int]) -> NDArray[np.int32]:
    """Where each of some runs begins, and the end of the last one."""
    return np.array(list(itertools.accumulate(sizes, initial=0)), np.int32)
