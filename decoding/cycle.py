"""One cycle: draft, choose boundaries, redraft, merge, verify, accept (docs/method.md).

All sequences of a batch go through it as one array, by the Python array API standard: NumPy's where an engine works in the
host's memory, PyTorch's on a device. There nothing is waited for but what was accepted, at the end of the cycle.
"""

import time
from collections.abc import Sequence as Many
from functools import partial

import numpy as np
from array_api_compat import array_namespace, is_numpy_namespace
from numpy.typing import NDArray

from decoding import acceptance, prefix_tree, trace
from decoding.acceptance import GONE, Walk
from decoding.clock import Clock
from decoding.drafting import Drafting
from decoding.engines import Array, Costs, DrafterEngine, Pass, TargetEngine
from decoding.follower import Follower
from decoding.modes import ModeName, Redraft, Selection
from decoding.ngrams import NGrams
from decoding.planner import Planner
from decoding.prefix_tree import PrefixTree
from decoding.sampling import Sampling
from decoding.sequence import Score, Sequence

VALUE_ONE = 2.0**32  # probabilities are read as integers, with all else
Piece = tuple[Sequence, int]  # so many more tokens of a prompt


class Decoder:
    """Runs cycles over sequences, each in its own mode.

    Args:
        first, second: None where no mode that drafts is asked for.
        mode: of sequences that name none.
        block_size: γ. branches: K. rows: of a best-first tree, the anchor among them.
        vocabulary: V, from which ``random_redraft`` draws. costs: of the engines' calls, by which ``auto`` plans.
        ngrams: None where there is no table.

    Attributes:
        verified: tokens of the last cycle, pieces of prompts aside. walks: what became of its trees.
        clock: where the time of cycles goes.
    """

    def __init__(
        self,
        target: TargetEngine,
        first: DrafterEngine | None,
        second: DrafterEngine | None,
        *,
        mode: ModeName,
        block_size: int,
        branches: int,
        rows: int = 16,
        vocabulary: int,
        selection: Selection = "confidence",
        redraft: Redraft = "exclusive",
        costs: Costs | None = None,
        ngrams: NGrams | None = None,
    ) -> None:
        self.target, self.costs = target, costs
        self.numbers: dict[Sequence, int] = {}
        self.host = is_numpy_namespace(array_namespace(target.send(np.zeros(1))))
        self.verified, self.walks, self.clock = 0, list[Walk](), Clock()
        self.drafting = Drafting(
            target,
            Follower(first, target, self.numbers, block_size, partial(self._ran, "first")) if first else None,
            Follower(second, target, self.numbers, block_size, partial(self._ran, "second")) if second else None,
            self.clock,
            mode=mode,
            branches=branches,
            rows=rows,
            vocabulary=vocabulary,
            selection=selection,
            redraft=redraft,
            costs=costs,
            ngrams=ngrams,
        )

    @property
    def planner(self) -> Planner | None:
        """What plans the cycles of ``auto``."""
        return self.drafting.auto.planner if self.drafting.auto else None

    def room(self, sequence: Sequence) -> bool:
        """Whether one more sequence can be opened."""
        rows = _rows(sequence)
        return self.target.room(rows) and all(f.engine.room(rows) for f in self.drafting.followers(sequence))

    def open(self, sequence: Sequence) -> None:
        """Begin a sequence. What an engine still knows of its prompt need not be computed again."""
        # What is known of a prompt was computed without being asked what it says.
        fresh = sequence.scores_prompt
        number = self.numbers[sequence] = self.target.open(sequence.tokens, _rows(sequence), fresh)
        for follower in self.drafting.followers(sequence):
            follower.open(sequence, _rows(sequence))
        sequence.computed = self.target.length(number)

    def close(self, sequence: Sequence) -> None:
        """End a sequence and free what it held."""
        self.target.close(self.numbers.pop(sequence))
        self.drafting.close(sequence)

    def reset(self) -> None:
        """End all sequences, whatever state the engines are in."""
        self.numbers.clear()
        self.target.reset()
        self.drafting.reset()

    def cycle(self, sequences: Many[Sequence], pieces: Many[Piece] = ()) -> list[list[int]]:
        """Advance every sequence by at least one token, and take pieces of other sequences' prompts in.

        Args:
            sequences: whose prompts are in the cache but for the anchor.
            pieces: sequences, and how many more tokens of their prompts; the anchor never.

        Returns:
            The tokens committed to each of ``sequences``.
        """
        self.clock.start()
        pieces = sorted(pieces, key=lambda piece: not piece[0].scores_prompt)
        silent = sum(not s.scores_prompt for s, _ in pieces)
        if pieces and not (sequences and self.target.ragged):
            self._score_prompts(pieces, self.run([s for s, _ in pieces], self._chains(pieces), silent), 0)
            self.keep([s for s, _ in pieces], [range(count) for _, count in pieces])
            pieces, silent = [], 0
            self.clock.mark("prompts")
        if not sequences:
            return []
        others, context = sum(count for _, count in pieces), sum(s.computed for s, _ in pieces)
        tree = self.drafting.trees(sequences, others, context)
        self.verified = sum(tree.counts)
        self.clock.mark("tree")
        rows = [*sequences, *(s for s, _ in pieces)]
        verified = self.run(rows, [tree, *self._chains(pieces)], silent)
        self.clock.mark("target")
        self.walks = self.walk(sequences, tree, verified, len(pieces))
        self._score(self.walks, verified)
        self._score_prompts(pieces, verified, len(sequences))
        kept = [walk.accepted[: len(walk.said)] for walk in self.walks]
        self.keep(rows, [*kept, *(range(count) for _, count in pieces)])
        self.drafting.learn(self.walks)
        self.clock.mark("commit")
        trace.note(self.walks, self.clock, self.drafting.plan)
        return [walk.said for walk in self.walks]

    def run(self, sequences: Many[Sequence], trees: Many[PrefixTree], silent: int) -> Pass:
        """One target pass over the nodes of all trees; each follows what is in its sequence's cache. silent: how many of the
        last ones are pieces of prompts, of which nothing will be asked."""
        tree = prefix_tree.stack(trees)
        starts = self.target.send(np.array([s.computed for s in sequences], dtype=np.int64))
        numbers = [self.numbers[s] for s in sequences]
        began = time.perf_counter()
        verified = self.target.forward(numbers, tree.tokens, starts[:, None] + tree.depths, tree.mask, tree.counts, silent)
        context = sum(s.computed for s in sequences)
        self._ran("target", sum(tree.counts), len(sequences), context, time.perf_counter() - began)
        return verified

    def walk(self, sequences: Many[Sequence], tree: PrefixTree, verified: Pass, others: int) -> list[Walk]:
        """Commit what the target says (``acceptance.walk``). others: sequences of the pass behind these."""
        sampling = [*(s.sampling for s in sequences), *[Sampling()] * others]
        uniforms = np.zeros((len(sampling), tree.height + 1))
        for row, sequence in enumerate(sequences):
            if sequence.sampling.temperature:
                uniforms[row] = sequence.uniforms(tree.height + 1)
        drawn, none = self.target.send(uniforms), self.target.send(np.full(others, GONE))

        def choose(depth: int, nodes: Array) -> Array:
            rows = array_namespace(nodes).concat([nodes, none]) if others else nodes
            return verified.choose(rows, sampling, drawn[:, depth])[: len(sequences)]

        found = acceptance.walk(tree, choose)
        parts = [*found, tree.tokens, tree.parents, tree.depths, tree.origins, tree.values]
        columns = [part.tolist() for part in self._read(parts)]
        walks = []
        for b, sequence in enumerate(sequences):
            nodes, tokens, own, parents, depths, origins, values = (part[b] for part in columns)
            accepted = [node for node in nodes if node >= 0]
            said = tokens[: len(accepted)]
            said = said[: sequence.commit(said)]
            sequence.count(tree.counts[b] - 1, len(said))
            walks.append(Walk(sequence, accepted, said, own, parents, depths, origins, values))
        return walks

    def keep(self, sequences: Many[Sequence], rows: Many[Many[int]]) -> None:
        """Take rows of the last pass into the cache."""
        self.target.keep(rows)
        for sequence in sequences:
            sequence.computed = self.target.length(self.numbers[sequence])

    def _read(self, parts: Many[Array]) -> list[NDArray]:
        """Integers and, the last of them, probabilities; in one array, because a device is waited for once a cycle."""
        if self.host:
            return list(parts)
        *parts, values = parts
        xp = array_namespace(values)
        parts = [*parts, xp.astype(values * VALUE_ONE, xp.int64)]
        read = self.target.read(xp.concat(parts, axis=1))
        *columns, scaled = np.split(read, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
        return [*columns, scaled / VALUE_ONE]

    def _score(self, walks: Many[Walk], verified: Pass) -> None:
        """Note what the target says of the tokens that were committed."""
        for row, walk in enumerate(walks):
            if walk.sequence.top is not None:
                nodes = walk.accepted[: len(walk.said)]
                walk.sequence.scores += _scores(verified, row, nodes, walk.said, walk.sequence.top)

    def _score_prompts(self, pieces: Many[Piece], verified: Pass, first: int) -> None:
        """Note what the target says of the tokens behind those of pieces. first: the first piece's place in the pass."""
        for row, (sequence, count) in enumerate(pieces, first):
            if sequence.scores_prompt:
                following = sequence.tokens[sequence.computed + 1 : sequence.computed + 1 + count]
                sequence.prompt_scores += _scores(verified, row, range(count), following, sequence.top or 0)

    def _ran(self, engine: str, rows: int, sequences: int, context: int, seconds: float) -> None:
        """Tell what a call took. On a device nobody knows when it comes back."""
        if self.costs and self.host:
            self.costs.observe(engine, rows, sequences, context, seconds)

    def _chains(self, pieces: Many[Piece]) -> list[PrefixTree]:
        chains = [prefix_tree.chain(s.tokens[s.computed : s.computed + count]) for s, count in pieces]
        return [c.mapped(self.target.send) for c in chains]


def _scores(verified: Pass, row: int, nodes: Many[int], tokens: Many[int], top: int) -> list[Score]:
    own, best, theirs = verified.log_probabilities(row, nodes, tokens, top)
    return [
        (one, list(zip(ids, values, strict=True)))
        for one, ids, values in zip(own.tolist(), best.tolist(), theirs.tolist(), strict=True)
    ]


def _rows(sequence: Sequence) -> int:
    """Tokens that a sequence can come to hold."""
    return len(sequence.prompt) + sequence.max_tokens
