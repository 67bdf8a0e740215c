"""The decoding modes: where a cycle's branches come from.

``d2sd`` is the method. ``dflash`` and ``autoregressive`` are what it is compared with, ``runner_up`` is the gain to be had
without a second drafter, and the others are its ablations: what would refute it, were acceptance length not to fall.
"""

from dataclasses import dataclass
from typing import Literal, get_args

ModeName = Literal[
    "d2sd",
    "dflash",
    "autoregressive",
    "runner_up",
    "naive_samples",
    "dflash_twice",
    "random_redraft",
    "fixed_redraft",
    "uniform_prefixes",
]
Selection = Literal["confidence", "uniform"]
Redraft = Literal["exclusive", "free"]


@dataclass(frozen=True)
class Mode:
    """How a cycle drafts.

    Attributes:
        drafts: whether the first drafter drafts a block at all.
        branches: what fills the branches behind the selected boundaries: the second drafter's or the first one's
            redraft, the first draft with its runner-up token at the boundary, whole blocks sampled from the first
            draft's distributions, random tokens, or one fixed token. None: the first block stands alone.
        selection: overrides the pipeline's way of choosing boundaries.
    """

    drafts: bool = True
    branches: Literal["second", "first", "runner_up", "samples", "random", "fixed"] | None = None
    selection: Selection | None = None


MODES: dict[ModeName, Mode] = {
    "d2sd": Mode(branches="second"),
    "dflash": Mode(),
    "autoregressive": Mode(drafts=False),
    "runner_up": Mode(branches="runner_up"),
    "naive_samples": Mode(branches="samples"),
    "dflash_twice": Mode(branches="first"),
    "random_redraft": Mode(branches="random"),
    "fixed_redraft": Mode(branches="fixed"),
    "uniform_prefixes": Mode(branches="second", selection="uniform"),
}
assert set(MODES) == set(get_args(ModeName))
