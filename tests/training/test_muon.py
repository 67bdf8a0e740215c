"""Muon against PyTorch's own, and what orthogonal means."""

import pytest
import torch

from training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    made = orthogonal(u * torch.linspace(1, 10, u.shape[1]) @ v, torch.float32)
    assert made.shape == shape
    diagonal = u.T @ made @ v.T
    assert (diagonal.diagonal() > 0.6).all()
    assert (diagonal.diagonal() < 1.3).all()
    assert (diagonal - diagonal.diagonal().diag()).abs().max() < 1e-4


def test_it_takes_the_steps_of_pytorchs_muon_but_for_bf16():
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(24, 10, generator=generator)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = Muon([mine], lr=0.1, weight_decay=0.1, dtype=torch.float32)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        mine.grad = torch.randn(24, 10, generator=generator)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (mine - theirs).norm() < 0.03 * moved
