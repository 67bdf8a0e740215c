import math

import torch

from training.losses import ban, leading, weighted_cross_entropy


def test_cross_entropy_is_the_closed_form():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = weighted_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([0.75, 0.25]))
    assert math.isclose(float(loss), 0.75 * math.log(2) + 0.25 * math.log(10), rel_tol=1e-6)


def test_a_banned_token_leaves_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = weighted_cross_entropy(logits, torch.tensor([1, 1]), torch.ones(2), banned=torch.tensor([0, -1]))
    assert math.isclose(float(loss), math.log(2) + math.log(10), rel_tol=1e-6)


def test_gradients_do_not_reach_a_banned_token():
    logits = torch.randn(2, 4, requires_grad=True)
    weighted_cross_entropy(logits, torch.tensor([1, 2]), torch.ones(2), banned=torch.tensor([3, -1])).backward()
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
    weighted_cross_entropy(logits, labels, weights, torch.tensor([-1, 0]), wanted).backward()
    expected = weights[:, None] * (torch.stack([torch.softmax(logits[0], 0), torch.tensor([0.0, 0.5, 0.5])]) - wanted)
    torch.testing.assert_close(logits.grad, expected.detach())


def test_wanting_the_label_alone_is_the_loss_of_tokens():
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6, 1, 2])
    weights, banned = torch.rand(5, generator=torch.Generator().manual_seed(1)), torch.tensor([4, -1, 2, -1, 0])
    certain = torch.nn.functional.one_hot(labels, 7).float()
    mine = weighted_cross_entropy(logits, labels, weights, banned, certain)
    torch.testing.assert_close(mine, weighted_cross_entropy(logits, labels, weights, banned))
