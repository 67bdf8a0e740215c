"""Toy models for decoding: engines over vocabularies of a few tokens that check all that they are handed."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from decoding.ngrams import NGrams, key
from engines.sampling import choose, log_probabilities

VOCABULARY = 5


def logits_after(context: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    """The toy language: a random but fixed distribution after each context, ``[V]`` f32."""
    return _noise((seed, *context[-3:], len(context)), 1.5, vocabulary)


@cache
def _noise(key: tuple[int, ...], scale: float, size: int) -> np.ndarray:
    return np.random.default_rng(key).normal(scale=scale, size=size).astype(np.float32)


class ToySequences:
    """Token sequences instead of caches.

    Args:
        slots: sequences that there is room for.
        remembers: tokens of a prompt that a new sequence starts with, at most, if an earlier one began so.
    """

    def __init__(self, slots: int = 8, remembers: int = 0) -> None:
        self.slots, self.remembers = slots, remembers
        self.caches: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}
        self.known: list[list[int]] = []
        self.opened = 0

    @property
    def used(self) -> float:
        return len(self.caches) / self.slots

    def room(self, rows: int) -> bool:
        return len(self.caches) < self.slots

    def open(self, tokens: list[int], rows: int, fresh: bool = False) -> int:
        assert self.room(rows)
        assert len(tokens) <= rows
        shared = max((_common(tokens[:-1], other) for other in self.known), default=0)
        self.opened += 1
        self.caches[self.opened] = [] if fresh else tokens[: min(shared, self.remembers)]
        self.reserved[self.opened] = rows
        return self.opened

    def length(self, sequence: int) -> int:
        return len(self.caches[sequence])

    def close(self, sequence: int) -> None:
        self.known.append(self.caches.pop(sequence))

    def reset(self) -> None:
        self.caches.clear()

    def send(self, array):
        return array

    def read(self, array):
        return array


class ToyTarget(ToySequences):
    """Its features are the tokens themselves, ``[m, 1]``."""

    def __init__(self, vocabulary: int = VOCABULARY, ragged: bool = True, **options) -> None:
        super().__init__(**options)
        self.vocabulary, self.ragged = vocabulary, ragged
        self.calls: list[int] = []  # rows of each

    def forward(self, sequences, token_ids, positions, mask, counts, silent=0):
        batch, n = token_ids.shape
        assert len(set(sequences)) == len(sequences) == batch == len(counts)
        assert positions.shape == (batch, n)
        assert mask.shape == (batch, n, n)
        assert max(counts) <= n
        self.calls.append(sum(counts))
        logits = np.zeros((batch, n, self.vocabulary), np.float32)
        for b, sequence in enumerate(sequences):
            assert not mask[b, counts[b] :].any()
            assert not mask[b, :, counts[b] :].any()
            for node in range(counts[b]):
                seen = np.flatnonzero(mask[b, node])
                if not len(seen):
                    continue  # a filler, of which only a device knows
                cache = self.caches[sequence]
                assert positions[b, seen].tolist() == list(range(len(cache), len(cache) + len(seen))), "a gap or a fork"
                assert seen[-1] == node
                logits[b, node] = logits_after(cache + token_ids[b, seen].tolist(), vocabulary=self.vocabulary)
        logits[batch - silent :] = np.nan
        self.last = list(sequences), token_ids.copy()
        return ToyPass(logits)

    def keep(self, rows):
        sequences, tokens = self.last
        for sequence, chosen, own in zip(sequences, rows, tokens, strict=True):
            self.caches[sequence] += own[list(chosen)].tolist()
            assert len(self.caches[sequence]) <= self.reserved[sequence]
        del self.last

    def features(self, sequence, start, stop):
        assert 0 <= start <= stop <= self.length(sequence)
        return np.array(self.caches[sequence][start:stop], np.float32)[:, None]


class ToyPass:
    def __init__(self, logits) -> None:
        self.logits = logits

    def choose(self, nodes, sampling, uniforms):
        assert len(nodes) == len(sampling) == len(uniforms) == len(self.logits)
        chosen = np.zeros(len(nodes), np.int64)
        for b in np.flatnonzero(nodes >= 0):
            chosen[b] = choose(self.logits[b, nodes[b]], sampling[b], uniforms[b])
        return chosen

    def log_probabilities(self, row, nodes, tokens, top):
        return log_probabilities(self.logits[row, list(nodes)], np.array(tokens), top)


class ToyDrafter(ToySequences):
    """Guesses the toy language with some noise, and checks that its features are the committed tokens.

    Args:
        target: whose committed tokens its own must equal. noise: of its logits.
    """

    def __init__(self, target: ToyTarget, noise: float, seed: int, **options) -> None:
        super().__init__(**options)
        self.target, self.noise, self.seed = target, noise, seed
        self.mask_id = target.vocabulary
        self.calls: list[tuple[int, int]] = []  # sequences and block tokens of each

    def forward(self, sequences, features, block_ids, positions, mask):
        batch, n = block_ids.shape
        assert len(set(sequences)) == len(sequences) == len(features) == batch
        assert positions.shape == (batch, n)
        assert mask.shape == (batch, n, n)
        self.calls.append((batch, n))
        width = min(4, self.target.vocabulary)
        candidates = np.zeros((batch, n, width), np.int64)
        probabilities = np.zeros((batch, n, width), np.float32)
        for b, sequence in enumerate(sequences):
            cache = self.caches[sequence]
            assert features[b].shape[1:] == (1,)
            assert len(features[b]) <= 256
            cache += features[b][:, 0].astype(int).tolist()
            assert len(cache) <= self.reserved[sequence]
            if n:
                assert cache in self.target.caches.values(), "the drafter missed a committed token or saw one twice"
            for place in range(n):
                block = np.flatnonzero(mask[b, place])
                assert positions[b, block].tolist() == [len(cache) + k for k in range(len(block))]
                known = cache + [int(t) for t in block_ids[b, block] if t != self.mask_id]
                hidden = int(place - block[0])
                vocabulary = self.target.vocabulary
                noise = _noise((self.seed, hidden, *known[-4:]), self.noise, vocabulary)
                guess = logits_after(known, vocabulary=vocabulary) + noise
                odds = np.exp(guess - guess.max())
                odds /= odds.sum()
                candidates[b, place] = np.argsort(-odds)[:width]
                probabilities[b, place] = odds[candidates[b, place]]
        return candidates, probabilities


def _common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ToyCosts:
    """Staircases: a call takes a base, and a step for every so many rows.

    Args:
        base, step: seconds. width: rows of a step. noise: of all seconds said, as a factor, random each time.
        first, second: a drafter's seconds by the target's.
    """

    def __init__(self, base=1.0, step=0.25, width=8, first=0.2, second=0.2, noise=0.0, seed=0) -> None:
        self.base, self.step, self.width, self.share = base, step, width, {"target": 1.0, "first": first, "second": second}
        self.noise, self.rng = noise, np.random.default_rng(seed)
        self.observed: list[tuple] = []
        self.pace = 1.0

    def _seconds(self, engine, rows, sequences, context):
        assert rows.dtype == np.int64
        assert (rows >= sequences).all()
        assert context >= 0
        seconds = self.share[engine] * (self.base + self.step * np.ceil(rows / self.width))
        return seconds * np.exp(self.noise * self.rng.normal(size=rows.shape))

    def target(self, rows, sequences, context):
        return self._seconds("target", rows, sequences, context)

    def first(self, rows, sequences, context):
        return float(self._seconds("first", np.array([rows]), sequences, context)[0])

    def second(self, rows, sequences, context):
        return float(self._seconds("second", np.array([rows]), sequences, context)[0])

    def observe(self, engine, rows, sequences, context, seconds):
        assert engine in self.share
        assert seconds >= 0
        self.observed.append((engine, rows, sequences, context))


class OnDevice:
    """A toy engine behind a device's memory, for which PyTorch's stands; what is read is counted."""

    def __init__(self, engine) -> None:
        self.engine, self.reads = engine, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def send(self, array):
        return torch.tensor(array)

    def read(self, array):
        self.reads += 1
        return _host(array)

    def forward(self, sequences, *arrays):
        made = self.engine.forward(sequences, *map(_host, arrays))
        return OnDevicePass(made) if isinstance(made, ToyPass) else tuple(map(torch.tensor, made))

    def features(self, *where):
        return torch.tensor(self.engine.features(*where))


class OnDevicePass:
    def __init__(self, made) -> None:
        self.made = made

    def choose(self, nodes, sampling, uniforms):
        return torch.tensor(self.made.choose(_host(nodes), sampling, _host(uniforms)))


def _host(x):
    """What a toy's own inside sees of what it is handed."""
    if isinstance(x, torch.Tensor):
        return NUMPY(x)
    return [_host(part) for part in x] if isinstance(x, list) else x


NUMPY = torch.Tensor.numpy


def ngrams(vocabulary: int = VOCABULARY, order: int = 2, seed: int = 0, beyond: int = 0) -> NGrams:
    """A table of random contexts. beyond: a token of the first row, which the vocabulary has not."""
    rng = np.random.default_rng(seed)
    contexts = [()]
    for size in range(1, order + 1):
        contexts += [c for c in np.ndindex(*[vocabulary] * size) if c[1:] in contexts and rng.random() < 0.7]
    width = min(3, vocabulary)
    tokens = np.array([rng.permutation(vocabulary)[:width] for _ in contexts], np.int32)
    odds = -np.sort(-rng.random((len(contexts), width + 1)), axis=-1)
    probabilities = (odds / odds.sum(-1, keepdims=True))[:, :width].astype(np.float16)
    tokens[0, 0] += beyond
    keys = np.array([key(context, vocabulary) for context in contexts], np.int64)
    return NGrams(vocabulary, order, keys, tokens, probabilities)
