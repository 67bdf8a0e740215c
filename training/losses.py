"""The loss over predicted places, and how many tokens a block would have won."""

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, banned: Tensor | None = None, wanted: Tensor | None = None
) -> Tensor:
    """Σ w·(-log p(label)) over rows, or Σ w·(-Σ q·log p) of a distribution q that is wanted.

    Args:
        logits: ``[R, Vd]``. labels: ``[R]`` int64, indices of the draft vocabulary. weights: ``[R]``.
        banned: ``[R]`` int64, an index that the row may not choose, or -1: the first place of an exclusive redraft.
        wanted: ``[R, Vd]``, q of each row, 0 at its banned index; None wants the label alone.
    """
    logits = logits.float()
    if wanted is not None:  # 0·log 0 would be NaN: what is banned gets a finite logit that weighs nothing
        logits = logits if banned is None else ban(logits, banned, -1e4)
        return (F.cross_entropy(logits, wanted, reduction="none") * weights).sum()
    logits = logits if banned is None else ban(logits, banned)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def ban(logits: Tensor, banned: Tensor, value: float = -torch.inf) -> Tensor:
    """Return ``[R, Vd]`` with ``value`` at index ``banned[r]`` of row r, where that is not -1."""
    rows = (banned >= 0).nonzero().squeeze(1)
    return logits.index_put((rows, banned[rows]), logits.new_tensor(value))


def leading(correct: Tensor) -> Tensor:
    """Length of the run of true values at the start of the last axis."""
    return correct.long().cumprod(-1).sum(-1)
