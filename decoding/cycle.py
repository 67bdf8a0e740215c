"""One cycle: draft, choose boundaries, redraft, merge, verify, accept (docs/method.md).

All sequences of a batch go through it as one array, by the Python array API standard: NumPy's where an engine works in the
host's memory, PyTorch's on a device. There nothing is waited for but what was accepted, at the end of the cycle.
"""

from collections.abc import Sequence as Many

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from decoding import acceptance, prefix_tree
from decoding.acceptance import GONE
from decoding.drafting import Drafting
from decoding.engines import Array, DrafterEngine, Pass, TargetEngine
from decoding.follower import Follower
from decoding.modes import ModeName, Redraft, Selection
from decoding.prefix_tree import PrefixTree
from decoding.sampling import Sampling
from decoding.sequence import Sequence

Piece = tuple[Sequence, int]  # so many more tokens of a prompt


class Decoder:
    """Runs cycles over sequences, each in its own mode.

    Args:
        first, second: None where no mode that drafts is asked for.
        mode: of sequences that name none.
        block_size: γ. branches: K.
        vocabulary: V, from which ``random_redraft`` draws.
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
        vocabulary: int,
        selection: Selection = "confidence",
        redraft: Redraft = "exclusive",
    ) -> None:
        self.target = target
        self.numbers: dict[Sequence, int] = {}
        self.drafting = Drafting(
            target,
            Follower(first, target, self.numbers, block_size) if first else None,
            Follower(second, target, self.numbers, block_size) if second else None,
            mode=mode,
            branches=branches,
            vocabulary=vocabulary,
            selection=selection,
            redraft=redraft,
        )

    def room(self, sequence: Sequence) -> bool:
        """Whether one more sequence can be opened."""
        rows = _rows(sequence)
        return self.target.room(rows) and all(f.engine.room(rows) for f in self.drafting.followers(sequence))

    def open(self, sequence: Sequence) -> None:
        """Begin a sequence. What an engine still knows of its prompt need not be computed again."""
        number = self.numbers[sequence] = self.target.open(sequence.tokens, _rows(sequence))
        for follower in self.drafting.followers(sequence):
            follower.open(sequence, _rows(sequence))
        sequence.computed = self.target.length(number)

    def close(self, sequence: Sequence) -> None:
        """End a sequence and free what it held."""
        self.target.close(self.numbers.pop(sequence))
        for follower in self.drafting.followers(sequence):
            follower.close(sequence)

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
        if pieces and not (sequences and self.target.ragged):
            self.run([s for s, _ in pieces], self._chains(pieces))
            self.keep([s for s, _ in pieces], [range(count) for _, count in pieces])
            pieces = ()
        if not sequences:
            return []
        tree = self.drafting.trees(sequences)
        rows = [*sequences, *(s for s, _ in pieces)]
        verified = self.run(rows, [tree, *self._chains(pieces)])
        committed, kept = [], []
        for sequence, nodes, tokens in zip(sequences, *self.walk(sequences, tree, verified, len(pieces)), strict=True):
            accepted = nodes[nodes >= 0].tolist()
            chosen = tokens[: len(accepted)].tolist()
            count = sequence.commit(chosen)
            sequence.cycles += 1
            committed.append(chosen[:count])
            kept.append(accepted[:count])
        self.keep(rows, [*kept, *(range(count) for _, count in pieces)])
        return committed

    def run(self, sequences: Many[Sequence], trees: Many[PrefixTree]) -> Pass:
        """One target pass over the nodes of all trees; each follows what is in its sequence's cache."""
        tree = prefix_tree.stack(trees)
        starts = self.target.send(np.array([s.computed for s in sequences], dtype=np.int64))
        numbers = [self.numbers[s] for s in sequences]
        return self.target.forward(numbers, tree.tokens, starts[:, None] + tree.depths, tree.mask, tree.counts)

    def walk(
        self, sequences: Many[Sequence], tree: PrefixTree, verified: Pass, others: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The accepted nodes and the committed tokens (``acceptance.walk``). others: sequences of the pass behind these."""
        sampling = [*(s.sampling for s in sequences), *[Sampling()] * others]
        uniforms = np.zeros((len(sampling), tree.height + 1))
        uniforms[: len(sequences)] = [s.uniforms(tree.height + 1) for s in sequences]
        drawn = self.target.send(uniforms)
        none = self.target.send(np.full(others, GONE))
        xp = array_namespace(tree.tokens)

        def choose(depth: int, nodes: Array) -> Array:
            return verified.choose(xp.concat([nodes, none]), sampling, drawn[:, depth])[: len(sequences)]

        nodes, tokens = self.target.read(xp.stack(acceptance.walk(tree, choose)))
        return nodes, tokens

    def keep(self, sequences: Many[Sequence], rows: Many[Many[int]]) -> None:
        """Take rows of the last pass into the cache."""
        self.target.keep(rows)
        for sequence in sequences:
            sequence.computed = self.target.length(self.numbers[sequence])

    def _chains(self, pieces: Many[Piece]) -> list[PrefixTree]:
        chains = [prefix_tree.chain(s.tokens[s.computed : s.computed + count]) for s, count in pieces]
        return [c.mapped(self.target.send) for c in chains]


def _rows(sequence: Sequence) -> int:
    """Tokens that a sequence can come to hold."""
    return len(sequence.prompt) + sequence.max_tokens
