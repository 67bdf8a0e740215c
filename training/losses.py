"""The loss over predicted places, what a drafter says there, and how many tokens a block would have won."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 128  # whose logits are in the cache together, on a CPU


def weighted_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, banned: Tensor, wanted: Tensor | None = None
) -> Tensor:
    """Σ w·(-log p(label)) over rows, p = softmax(head·hidden), or Σ w·(-Σ q·log p) of a distribution q that is wanted.

    Logits as wide as the vocabulary are made and used up a few rows at a time, their gradient at once: a step reads and
    writes them in the cache. Under autocast products are of autocast's type; softmax and sums are f32.

    Args:
        hidden: ``[R, H]``, whose gradient is made. head: ``[Vd, H]``, which stays as it is. labels: ``[R]`` int64, indices of
            the draft vocabulary. weights: ``[R]`` f32.
        banned: ``[R]`` int64, an index that the row may not choose, or -1: the first place of an exclusive redraft.
        wanted: ``[R, Vd]``, q of each row, 0 at its banned index; None wants the label alone.
    """
    loss: Tensor = _CrossEntropy.apply(hidden, head, labels, weights, banned, wanted)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, banned: Tensor, wanted: Tensor | None
    ) -> Tensor:
        gradient, loss = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        narrow = _narrow(hidden)
        head = head.to(narrow)
        for part in _parts(hidden):
            said, w = labels[part, None], weights[part, None]
            log_p = ban(F.linear(hidden[part].to(narrow), head).float(), banned[part]).log_softmax(-1)
            if wanted is None:
                loss -= (log_p.gather(1, said) * w).sum()
                pull = log_p.exp_().mul_(w).scatter_add_(1, said, -w)
            else:
                q = wanted[part]
                loss -= (torch.where(q > 0, q * log_p, 0.0) * w).sum()  # 0·log 0 is 0
                pull = log_p.exp_().sub_(q).mul_(w)
            gradient[part] = pull.to(narrow) @ head
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None, None, None


def likeliest(hidden: Tensor, head: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` likeliest indices of each row ``[R, H]`` with a head ``[Vd, H]``: probabilities ``[R, W]`` f32 and indices
    ``[R, W]`` int64, falling. As many rows at a time, and in the types, as in ``weighted_cross_entropy``."""
    narrow = _narrow(hidden)
    head = head.to(narrow)
    probabilities = hidden.new_empty(len(hidden), width, dtype=torch.float32)
    indices = torch.empty(len(hidden), width, dtype=torch.int64, device=hidden.device)
    for part in _parts(hidden):
        logits = F.linear(hidden[part].to(narrow), head).float()
        best = logits.topk(width)
        indices[part] = best.indices
        probabilities[part] = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
    return probabilities, indices


def _narrow(hidden: Tensor) -> torch.dtype:
    """The type that products are made in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _parts(hidden: Tensor) -> list[slice]:
    """Rows whose logits are made together."""
    together = ROWS if hidden.device.type == "cpu" else max(len(hidden), 1)
    return [slice(start, start + together) for start in range(0, len(hidden), together)]


def ban(logits: Tensor, banned: Tensor) -> Tensor:
    """Return logits ``[R, Vd]``, -inf at index ``banned[r]`` of row r where that is not -1."""
    rows = (banned >= 0).nonzero().squeeze(1)
    return logits.index_put((rows, banned[rows]), logits.new_tensor(-torch.inf))


def leading(correct: Tensor) -> Tensor:
    """Length of the run of true values at the start of the last axis."""
    return correct.long().cumprod(-1).sum(-1)
