import math

import pytest
import torch
from torch.nn import functional as F

from training import losses
from training.losses import ban, leading, likeliest, weighted_cross_entropy

NONE = torch.tensor([-1, -1])


def said(logits, *rest):
    """Of logits themselves: the head is the identity."""
    return weighted_cross_entropy(logits, torch.eye(logits.shape[1]), *rest)


def test_cross_entropy_is_the_closed_form():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = said(logits, torch.tensor([0, 1]), torch.tensor([0.75, 0.25]), NONE)
    assert math.isclose(float(loss), 0.75 * math.log(2) + 0.25 * math.log(10), rel_tol=1e-6)


def test_a_banned_token_leaves_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = said(logits, torch.tensor([1, 1]), torch.ones(2), torch.tensor([0, -1]))
    assert math.isclose(float(loss), math.log(2) + math.log(10), rel_tol=1e-6)


def test_gradients_do_not_reach_a_banned_token():
    logits = torch.randn(2, 4, requires_grad=True)
    said(logits, torch.tensor([1, 2]), torch.ones(2), torch.tensor([3, -1])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 3] == 0
    assert logits.grad[1, 3] != 0
    assert torch.isfinite(logits.grad).all()


def test_ban_leaves_other_rows():
    logits = torch.zeros(3, 2)
    assert ban(logits, torch.tensor([-1, 1, -1])).tolist() == [[0, 0], [0, -torch.inf], [0, 0]]


def test_leading():
    assert leading(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()).tolist() == [2, 0, 4]


def test_a_wanted_distribution_pulls_the_logits_towards_itself():
    logits = torch.tensor([[1.0, 0.5, -2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    wanted = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.25, 0.75]])
    weights, labels = torch.tensor([1.0, 0.5]), torch.tensor([1, 2])
    said(logits, labels, weights, torch.tensor([-1, 0]), wanted).backward()
    expected = weights[:, None] * (torch.stack([torch.softmax(logits[0], 0), torch.tensor([0.0, 0.5, 0.5])]) - wanted)
    torch.testing.assert_close(logits.grad, expected.detach())


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 21])
@pytest.mark.parametrize("kind", ["tokens", "distribution"])
def test_a_few_rows_at_a_time_are_all_rows_at_once(rows, kind, monkeypatch):
    """Against PyTorch's own cross-entropy and its gradient, which see all logits."""
    monkeypatch.setattr(losses, "ROWS", 8)
    g = torch.Generator().manual_seed(rows)
    hidden, head = torch.randn(rows, 6, generator=g), torch.randn(11, 6, generator=g)
    labels, weights = torch.randint(0, 10, (rows,), generator=g), torch.rand(rows, generator=g)
    banned = torch.where(torch.rand(rows, generator=g) < 0.5, 10, -1)
    wanted = None
    if kind == "distribution":
        wanted = ban(torch.randn(rows, 11, generator=g), banned).softmax(-1)

    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = weighted_cross_entropy(mine, head, labels, weights, banned, wanted)
    (3 * loss).backward()
    logits = F.linear(theirs, head)
    logits = torch.where(F.one_hot(banned.clamp(min=0), 11).bool() & (banned >= 0)[:, None], -1e4, logits)
    expected = (F.cross_entropy(logits, labels if wanted is None else wanted, reduction="none") * weights).sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_under_autocast_products_are_bf16_and_sums_f32():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(5, 64, generator=g, requires_grad=True), torch.randn(300, 64, generator=g)
    labels, weights, banned = torch.tensor([0, 3, 6, 1, 2]), torch.rand(5, generator=g), torch.tensor([4, -1, 2, -1, 0])
    exact = weighted_cross_entropy(hidden, head, labels, weights, banned)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = weighted_cross_entropy(hidden, head, labels, weights, banned)
        logits = F.linear(hidden.detach(), head)
    assert rounded.dtype == torch.float32
    log_p = ban(logits.float(), banned).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(rounded, -(log_p * weights).sum())
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)
    assert float(rounded.detach()) != float(exact.detach())


@pytest.mark.parametrize("rows", [0, 1, 8, 21])
def test_the_likeliest_are_those_of_the_whole_softmax(rows, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 8)
    g = torch.Generator().manual_seed(rows)
    hidden, head = torch.randn(rows, 6, generator=g), torch.randn(11, 6, generator=g)
    probabilities, indices = likeliest(hidden, head, 3)
    expected = F.linear(hidden, head).softmax(-1).topk(3)
    torch.testing.assert_close(probabilities, expected.values)
    assert torch.equal(indices, expected.indices)
