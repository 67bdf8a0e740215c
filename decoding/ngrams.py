"""n-grams as a source: what the target usually says behind its last tokens, counted from its own answers (docs/method.md §4).

Where the text says nothing of itself, a table still knows how such texts go on; asking it costs no pass. ``training/ngrams.py``
makes one. The longest context that the table knows answers: its options are already mixed with those of shorter contexts.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decoding.coupling import Coupling
from decoding.sequence import Sequence
from decoding.sources import NGRAMS, Option

HEIGHT = 8  # tokens of a path; each is less sure than the one before
FIELDS = ("vocabulary", "order", "keys", "tokens", "probabilities")
Context = tuple[int, ...]


class NGramsError(ValueError):
    """A file that is no table of n-grams; the message says what was found."""


class NGrams:
    """A table of contexts.

    Args:
        vocabulary: V. order: tokens of a context, at most; (V + 1)^order is below 2^63.
        keys: ``[C]`` int64, the contexts (``key``); with one there is each that it ends with, the empty one included.
        tokens: ``[C, A]``, what follows, likeliest first. probabilities: ``[C, A]`` float, of each; 0 for none.
    """

    def __init__(self, vocabulary: int, order: int, keys: NDArray, tokens: NDArray, probabilities: NDArray) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.keys, self.tokens, self.probabilities = keys, tokens, probabilities
        self._rows = dict(zip(keys.tolist(), range(len(keys)), strict=True))
        self._likeliest: list[float] = probabilities[:, 0].tolist()

    @classmethod
    def read(cls, file: Path) -> "NGrams":
        """Read a table.

        Raises:
            NGramsError: there is none.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                vocabulary, order, keys, tokens, probabilities = (stored[name] for name in FIELDS)
            alike = tokens.ndim == 2 and tokens.shape == probabilities.shape and keys.shape == tokens.shape[:1]
            if not alike or 0 not in keys or not 0 <= int(tokens.min()) <= int(tokens.max()) < int(vocabulary):
                raise ValueError("its arrays do not fit each other")
            return cls(int(vocabulary), int(order), keys, tokens, probabilities)
        except Exception as error:  # NumPy's reader raises whatever a zip archive's reader does
            raise NGramsError(f"{file}: not a table of n-grams ({error})") from None

    def write(self, file: Path) -> None:
        """Write it."""
        arrays = (np.array(self.vocabulary), np.array(self.order), self.keys, self.tokens, self.probabilities)
        with file.open("wb") as stream:
            np.savez_compressed(stream, **dict(zip(FIELDS, arrays, strict=True)))

    def options(self, context: Context) -> list[Option]:
        """What follows, likeliest first. context: the last tokens, ``order`` of them at most."""
        row = self._row(context)
        found = zip(self.probabilities[row].tolist(), self.tokens[row].tolist(), strict=True)
        return [(p, token, NGRAMS) for p, token in found if p > 0]

    def _row(self, context: Many[int]) -> int:
        """Of the longest context that is known."""
        row, number, scale = self._rows[0], 0, 1
        for token in reversed(context):
            number += (token + 1) * scale
            scale *= self.vocabulary + 1
            longer = self._rows.get(number)
            if longer is None:
                break
            row = longer
        return row

    def propose(self, sequences: Many[Sequence]) -> "NGramSource":
        """What follows the last tokens of sequences."""
        return NGramSource(self, [tuple(s.tokens[-self.order :]) for s in sequences])

    def worth(self, sequence: Sequence, least: float = 0.0, coupling: Coupling | None = None) -> list[float]:
        """What the likeliest nodes are worth, about: what follows the anchor, and the likeliest behind the likeliest, but none
        below ``least``. coupling: of a sequence that is sampled; what it says of the next token alone is looked at."""
        context = sequence.tokens[-self.order :]
        row = self._row(context)
        if coupling:
            options = zip(self.probabilities[row].tolist(), self.tokens[row].tolist(), strict=True)
            return [worth for p, token in options if (worth := coupling.coupled(p, 1, token)) > least]
        if self._likeliest[row] < least:
            return []
        found = [p for p in self.probabilities[row].tolist() if p > least]
        value = 1.0
        for _ in range(HEIGHT - 1):
            value *= self._likeliest[row]
            context = [*context, int(self.tokens[row, 0])][-self.order :]
            row = self._row(context)
            if value * self._likeliest[row] <= least:
                break
            found.append(value * self._likeliest[row])
        return found


class NGramRow:
    """A state: the context that decides."""

    def __init__(self, table: NGrams, context: Context) -> None:
        self.table, self.context = table, context
        self.options = table.options(context)

    def after(self, token: int) -> "NGramRow":
        return NGramRow(self.table, (*self.context, token)[-self.table.order :])


@dataclass(frozen=True)
class NGramSource:
    """A table behind the last tokens of B sequences. Contract: ``sources.Proposer``."""

    table: NGrams
    contexts: list[Context]
    height = HEIGHT

    def start(self, b: int) -> NGramRow:
        return NGramRow(self.table, self.contexts[b])


def load(file: Path | None) -> NGrams | None:
    """What a build has.

    Raises:
        NGramsError: as ``NGrams.read``.
    """
    return NGrams.read(file) if file else None


def key(context: Many[int], vocabulary: int) -> int:
    """A context's number: its last token is the last digit."""
    number = 0
    for token in context:
        number = number * (vocabulary + 1) + token + 1
    return number
