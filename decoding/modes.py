"""The decoding modes: what a cycle verifies, and where it comes from.

``auto`` chooses, each cycle, what brings most for what it costs here. ``autoregressive`` is plain decoding. ``lookup``,
``ngrams`` and ``ddtree`` are best-first trees of one source; of several are ``free`` (those that cost no pass), ``first_text``,
``first_second``, ``pooled`` (the drafters' and the text) and ``all``. ``d2sd`` is the
published method, ``dflash`` its first draft alone, ``runner_up`` the gain to be had without a second drafter, and the others
are its ablations: what would refute it, were acceptance length not to fall.
"""

from dataclasses import dataclass
from typing import Literal, get_args

ModeName = Literal[
    "auto",
    "autoregressive",
    "lookup",
    "ngrams",
    "free",
    "ddtree",
    "first_text",
    "first_second",
    "pooled",
    "all",
    "d2sd",
    "dflash",
    "runner_up",
    "naive_samples",
    "dflash_twice",
    "random_redraft",
    "fixed_redraft",
    "uniform_prefixes",
]
SourceName = Literal["first", "second", "text", "ngrams"]
Selection = Literal["confidence", "uniform"]
Redraft = Literal["exclusive", "free"]


@dataclass(frozen=True)
class Mode:
    """How a cycle drafts: a best-first tree fed by sources, or whole branches.

    Attributes:
        sources: of the tree: the first drafter's marginals, the second one's redrafts, earlier matches in the text, n-grams
            of the target's answers.
        block: whether the first draft is verified whole. branches: what fills the branches beside it, behind the selected
            boundaries: the second drafter's or the first one's redraft, the first draft with its runner-up token at the
            boundary, whole blocks sampled from the first draft's distributions, random tokens, or one fixed token.
        selection: overrides the pipeline's way of choosing boundaries.
        planned: whether a planner chooses, each cycle, which of the sources are worth their time, and how many nodes.
    """

    sources: frozenset[SourceName] = frozenset()
    block: bool = False
    branches: Literal["second", "first", "runner_up", "samples", "random", "fixed"] | None = None
    selection: Selection | None = None
    planned: bool = False

    @property
    def drafts(self) -> bool:
        """Whether it calls the first drafter."""
        return self.block or "first" in self.sources

    @property
    def redrafts(self) -> bool:
        """Whether it calls the second drafter."""
        return self.branches == "second" or "second" in self.sources


def _tree(*sources: SourceName) -> Mode:
    return Mode(frozenset(sources))


MODES: dict[ModeName, Mode] = {
    "auto": Mode(frozenset({"first", "second", "text", "ngrams"}), planned=True),
    "autoregressive": Mode(),
    "lookup": _tree("text"),
    "ngrams": _tree("ngrams"),
    "free": _tree("text", "ngrams"),
    "ddtree": _tree("first"),
    "first_text": _tree("first", "text"),
    "first_second": _tree("first", "second"),
    "pooled": _tree("first", "second", "text"),
    "all": _tree("first", "second", "text", "ngrams"),
    "d2sd": Mode(block=True, branches="second"),
    "dflash": Mode(block=True),
    "runner_up": Mode(block=True, branches="runner_up"),
    "naive_samples": Mode(block=True, branches="samples"),
    "dflash_twice": Mode(block=True, branches="first"),
    "random_redraft": Mode(block=True, branches="random"),
    "fixed_redraft": Mode(block=True, branches="fixed"),
    "uniform_prefixes": Mode(block=True, branches="second", selection="uniform"),
}
assert set(MODES) == set(get_args(ModeName))
DRAFTED = _tree("first", "text", "ngrams")  # what ``auto`` verifies where it drafts, and does not redraft
