"""The text as a source: what followed the longest earlier match of its last tokens (docs/method.md §4)."""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from decoding.coupling import Coupling
from decoding.sequence import Sequence
from decoding.sources import TEXT

SIZES = (4, 3, 2, 1)  # tokens of a match that is looked up; a longer one is found by growing it
PLACES = 4  # latest ends of each n-gram that are remembered
LONGEST = 20  # tokens of a match, from which on all are alike
CONTINUATIONS = 2
HEIGHT = 16  # tokens of a continuation

# How often a continuation's next token was right, by the tokens matched before it, the continuation's own among them: seen on
# answers of the demo's target to training prompts. Below: for a second continuation, by the tokens since it left the first.
SEEN = [
    0.2,
    0.25,
    0.54,
    0.65,
    0.7,
    0.75,
    0.79,
    0.81,
    0.83,
    0.84,
    0.85,
    0.86,
    0.87,
    0.87,
    0.88,
    0.88,
    0.89,
    0.9,
    0.91,
    0.92,
    0.98,
]
SEEN_SECOND = [0.16, 0.28, 0.35, 0.43, 0.48, 0.52, 0.56, 0.6, 0.62, 0.64, 0.66, *[0.7] * 10]
assert len(SEEN) == len(SEEN_SECOND) == LONGEST + 1
WEIGHT = 50.0  # observations that these count for
OWN_WEIGHT = 8.0  # observations of one text that those of all texts count for
LEAST = 0.02  # of a node's value that is worth a look
MEMORY = 2000.0  # observations that are remembered, about; older ones fade


@dataclass(frozen=True)
class Continuation:
    """What followed an earlier match.

    Attributes:
        tokens: ``HEIGHT``. match: tokens that it matches, of those that the target said. left: its tokens that an earlier
            continuation says too; None if there is no earlier one.
    """

    tokens: list[int]
    match: int
    left: int | None

    def rate(self, depth: int) -> tuple[int, int]:
        """Which hit rate (row, column of ``Hits``) token ``depth`` = 0 … has."""
        if self.left is None:
            return 0, min(self.match + depth, LONGEST)
        return 1, min(depth - self.left, LONGEST)


@dataclass
class Hits:
    """How often continuations were right: of how many tokens, ``[2][LONGEST + 1]`` (``Continuation.rate``)."""

    right: list[list[float]] = field(default_factory=lambda: [[0.0] * (LONGEST + 1) for _ in range(2)])
    tried: list[list[float]] = field(default_factory=lambda: [[0.0] * (LONGEST + 1) for _ in range(2)])

    def learn(self, continuations: Many[Continuation], said: Many[int]) -> None:
        """Compare continuations with what the target said."""
        for continuation in continuations:
            for depth, (token, truth) in enumerate(zip(continuation.tokens, said, strict=False)):
                if depth >= (continuation.left or 0):
                    row, spot = continuation.rate(depth)
                    right, tried = self.right[row], self.tried[row]
                    if tried[spot] >= MEMORY:
                        tried[spot] /= 2
                        right[spot] /= 2
                    tried[spot] += 1
                    right[spot] += token == truth
                if token != truth:
                    break


class Text:
    """The texts of all open sequences, and what their repetitions have been worth."""

    def __init__(self) -> None:
        seen = [[WEIGHT * rate for rate in rates] for rates in (SEEN, SEEN_SECOND)]
        self.hits = Hits(seen, [[WEIGHT] * len(rates) for rates in seen])
        self.open: dict[Sequence, tuple[TextIndex, Hits]] = {}
        self.proposed: dict[Sequence, list[Continuation]] = {}

    def close(self, sequence: Sequence) -> None:
        self.open.pop(sequence, None)
        self.proposed.pop(sequence, None)

    def reset(self) -> None:
        self.open.clear()
        self.proposed.clear()

    def take_in(self, sequence: Sequence) -> None:
        """Take in what a sequence's text has grown by. A look does so itself, and takes longer then."""
        self._opened(sequence)[0].extend()

    def look(self, sequence: Sequence, least: float = 0.0) -> list[Continuation]:
        """What followed earlier matches of a sequence's last tokens. Once a cycle: who looks again sees the same.

        Args:
            least: matches of so few tokens that they are right less often are not looked up.
        """
        found = self.proposed.get(sequence)
        if found is None:
            right, tried = self.hits.right[0], self.hits.tried[0]
            sizes = [size for size in SIZES if right[size] >= least * tried[size]]
            found = self._opened(sequence)[0].lookup(len(sequence.tokens) - len(sequence.prompt), sizes)
            self.proposed[sequence] = found
        return found

    def _opened(self, sequence: Sequence) -> "tuple[TextIndex, Hits]":
        if sequence not in self.open:
            self.open[sequence] = (TextIndex(sequence.tokens), Hits())
        return self.open[sequence]

    def worth(self, sequence: Sequence, least: float = 0.0, coupling: Coupling | None = None) -> list[float]:
        """What the nodes that the text proposes for a sequence are worth, the best of each continuation first; none that is
        worth less than ``LEAST``. least: as in ``look``. coupling: of a sequence that is sampled."""
        found = list[float]()
        for continuation in self.look(sequence, least):
            own, value = self.open[sequence][1], 1.0
            for depth in range(continuation.left or 0, HEIGHT):
                rate = self._rate(own, continuation.rate(depth))
                value *= coupling.coupled(rate, depth + 1, continuation.tokens[depth]) if coupling else rate
                if value < LEAST:
                    break
                found.append(value)
        return found

    def propose(self, sequences: Many[Sequence], least: float = 0.0) -> "TextSource":
        """What earlier matches propose.

        Args:
            least: as in ``look``.
        """
        return TextSource([[*self._rated(s, least)] for s in sequences])

    def _rated(self, sequence: Sequence, least: float) -> Iterator["Rated"]:
        """Continuations, and from where each goes its own way how likely its tokens are."""
        continuations = self.look(sequence, least)
        own = self.open[sequence][1]
        for each in continuations:
            start = each.left or 0
            yield Rated(each.tokens, start, [self._rate(own, each.rate(depth)) for depth in range(start, HEIGHT)])

    def learn(self, sequence: Sequence, said: Many[int]) -> None:
        """Take note of what the target said behind the anchor of the last proposal."""
        continuations = self.proposed.pop(sequence, ())
        for hits in (self.hits, self.open[sequence][1]) if continuations else ():
            hits.learn(continuations, said)

    def _rate(self, own: Hits, spot: tuple[int, int]) -> float:
        row, place = spot
        everywhere = self.hits.right[row][place] / self.hits.tried[row][place]
        return (own.right[row][place] + OWN_WEIGHT * everywhere) / (own.tried[row][place] + OWN_WEIGHT)


@dataclass(frozen=True)
class Rated:
    """A continuation. probabilities: of its tokens from ``start`` on; those before an earlier continuation says, too."""

    tokens: list[int]
    start: int
    probabilities: list[float]


class TextSource:
    """Continuations of B texts. Contract: ``sources.Proposer``."""

    height = HEIGHT

    def __init__(self, texts: list[list[Rated]]) -> None:
        self.texts = texts

    def start(self, b: int) -> "TextRow":
        return TextRow(0, self.texts[b])


class TextRow:
    """A state: the continuations that are followed still, and for how many tokens."""

    def __init__(self, depth: int, followed: list[Rated]) -> None:
        self.depth, self.followed = depth, followed
        self.options = [
            (each.probabilities[depth - each.start], each.tokens[depth], TEXT) for each in followed if depth >= each.start
        ]
        if len(self.options) > 1 and (total := sum([p for p, _, _ in self.options])) > 1:
            # Two continuations together can't be likelier than certain.
            self.options = [(p / total, token, origin) for p, token, origin in self.options]

    def after(self, token: int) -> "TextRow":
        followed = [each for each in self.followed if each.tokens[self.depth] == token]
        return TextRow(self.depth + 1, followed) if followed and self.depth + 1 < HEIGHT else SILENT


SILENT = TextRow(HEIGHT, [])


class TextIndex:
    """The n-grams of a growing text, each with the places where it ended last. Constant time a token and a lookup."""

    def __init__(self, tokens: list[int]) -> None:
        """tokens: of the text; their owner goes on appending to them."""
        self.tokens = tokens
        self.indexed = 1
        self.ends: dict[tuple[int, ...], list[int]] = {}

    def lookup(self, said: int, sizes: Many[int] = SIZES) -> list[Continuation]:
        """What followed the longest earlier matches of the last tokens, longest and then latest first.

        Args:
            said: how many tokens at the end are the target's. What a prompt repeats of itself tells little of the answer.
            sizes: of the n-grams that are looked up, falling.
        """
        self.extend()
        tokens, count = self.tokens, len(self.tokens)
        found: list[Continuation] = []
        if not sizes or tuple(tokens[-sizes[-1] :]) not in self.ends:  # what is longer does not match either
            return found
        for size in sizes:
            matches = []
            for end in reversed(self.ends.get(tuple(tokens[-size:]), ())):
                match = size
                while match < min(LONGEST, end) and tokens[end - match - 1] == tokens[-match - 1]:
                    match += 1
                matches.append((-match, -end))
            for match, end in sorted(matches):
                # A match that reaches into its own continuation is a loop, and goes on as one.
                following = [tokens[i % (count + end) - end] for i in range(HEIGHT)]
                left = max((_common(following, other.tokens) for other in found), default=None)
                if left != HEIGHT:
                    found.append(Continuation(following, min(-match, said), left))
                if len(found) == CONTINUATIONS:
                    return found
        return found

    def extend(self) -> None:
        """Take in the n-grams that something follows."""
        tokens, known = self.tokens, self.ends
        for end in range(self.indexed, len(tokens)):
            gram = tuple(tokens[max(0, end - SIZES[0]) : end])
            for size in SIZES:
                if end >= size:
                    ends = known.setdefault(gram[-size:], [])
                    ends.append(end)
                    if len(ends) > PLACES:
                        del ends[0]
        self.indexed = max(self.indexed, len(tokens))


def _common(a: list[int], b: list[int]) -> int:
    """Tokens that two lists of one length begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
