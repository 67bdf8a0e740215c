"""Muon (Keller Jordan, 2024): momentum whose singular values are pushed towards one, for the matrices of a drafter.

PyTorch's own multiplies in bf16, which a CPU without instructions for it does a tenth as fast as f32: there a step of
Muon cost more than all the rest of training. This one multiplies in the precision that is asked for.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # maximal slope at zero
ITERATIONS = 5


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[R, C]`` of the matrix's singular vectors, its singular values near 1 (0.7 to 1.2), by Newton-Schulz steps."""
    a, b, c = QUINTIC
    wide = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).to(dtype)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, scaled to the size of an AdamW update (0.2·√max(R, C)), with decoupled decay.

    Args:
        matrices: parameters of two dimensions.
        dtype: in which the orthogonalisation multiplies.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                kept = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                kept.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(kept, group["momentum"]), self.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
