"""Toy models for decoding: engines over vocabularies of a few tokens that check all that they are handed."""

from collections.abc import Sequence

import numpy as np

from engines.engine import HostPass

VOCABULARY = 5


def logits_after(context: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    """The toy language: a random but fixed distribution after each context, ``[V]`` f32."""
    return np.random.default_rng((seed, *context[-3:], len(context))).normal(scale=1.5, size=vocabulary).astype(np.float32)


class ToySequences:
    """Token sequences instead of caches."""

    def __init__(self) -> None:
        self.running: list[list[int]] = []
        self.joining: list[int] = []

    def join(self, place) -> None:
        if place is None:
            self.running.append(self.joining)
        else:
            self.running[place] = self.joining
        self.joining = []

    def leave(self, sequence: int) -> None:
        del self.running[sequence]

    def reset(self) -> None:
        self.running, self.joining = [], []

    def send(self, array):
        return array

    def read(self, array):
        return array


class ToyTarget(ToySequences):
    """Its features are the tokens themselves, ``[B, N, 1]``."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.nodes_seen = 0

    def prefill(self, token_ids, positions, mask):
        start = len(self.joining)
        n = token_ids.shape[1]
        assert positions.tolist() == [list(range(start, start + n))]
        assert (mask[0] == np.tri(n, dtype=bool)).all()
        self.joining += token_ids[0].tolist()
        return token_ids[0, :, None].astype(np.float32)

    def forward(self, token_ids, positions, mask):
        batch, n = token_ids.shape
        assert batch == len(self.running)
        self.nodes_seen += n
        logits = np.zeros((batch, n, self.vocabulary), np.float32)
        for b in range(batch):
            for node in range(n):
                seen = np.flatnonzero(mask[b, node])
                if not len(seen):
                    continue  # padding
                past = len(self.running[b])
                assert positions[b, seen].tolist() == list(range(past, past + len(seen))), "a path has a gap or a fork"
                assert seen[-1] == node
                logits[b, node] = logits_after(self.running[b] + token_ids[b, seen].tolist(), vocabulary=self.vocabulary)
        self.last = token_ids.copy()
        return HostPass(logits, token_ids[..., None].astype(np.float32))

    def keep(self, rows):
        for sequence, chosen, tokens in zip(self.running, rows, self.last, strict=True):
            sequence += tokens[list(chosen)].tolist()


class ToyDrafter(ToySequences):
    """Guesses the toy language with some noise, and checks that its features are the committed tokens.

    Args:
        target: whose committed tokens its own must equal. noise: of its logits.
    """

    def __init__(self, target: ToyTarget, noise: float, seed: int) -> None:
        super().__init__()
        self.target, self.noise, self.seed = target, noise, seed
        self.mask_id = target.vocabulary

    def prefill(self, features):
        self.joining += features[:, 0].astype(int).tolist()

    def forward(self, features, block_ids, positions, mask):
        batch, n = block_ids.shape
        width = min(4, self.target.vocabulary)
        candidates = np.zeros((batch, n, width), np.int64)
        probabilities = np.zeros((batch, n, width), np.float32)
        for b in range(batch):
            if features[b] is not None:
                self.running[b] += features[b][:, 0].astype(int).tolist()
            assert self.running[b] == self.target.running[b], "the drafter missed a committed token or saw one twice"
            for place in range(n):
                block = np.flatnonzero(mask[b, place])
                assert positions[b, block].tolist() == [len(self.running[b]) + k for k in range(len(block))]
                known = self.running[b] + [int(t) for t in block_ids[b, block] if t != self.mask_id]
                hidden = int(place - block[0])
                rng = np.random.default_rng((self.seed, hidden, *known[-4:]))
                guess = logits_after(known, vocabulary=self.target.vocabulary) + rng.normal(
                    scale=self.noise, size=self.target.vocabulary
                )
                odds = np.exp(guess - guess.max())
                odds /= odds.sum()
                candidates[b, place] = np.argsort(-odds)[:width]
                probabilities[b, place] = odds[candidates[b, place]]
        return candidates, probabilities
