import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.blocks import discount, lay_blocks, sample_anchors, sample_kept

MASK = 99


def answers(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 90, (len(lengths), max(lengths)), generator=g)
    return tokens, torch.tensor(lengths)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=3),
    block_size=st.integers(2, 6),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_blocks_against_an_enumeration_of_who_sees_whom(lengths, block_size, count, seed):
    g = torch.Generator().manual_seed(seed)
    tokens, lengths_ = answers(lengths, seed)
    prompts = torch.tensor([1 + seed % (length - 1) for length in lengths])
    anchors = sample_anchors(prompts, lengths_, count, g)
    kept = sample_kept(tuple(anchors.shape), block_size, 0.7, g)
    blocks = lay_blocks(tokens, lengths_, anchors, kept, block_size, MASK, tau=3.0)
    width = tokens.shape[1]
    for s, a, k in itertools.product(range(len(lengths)), range(anchors.shape[1]), range(block_size)):
        row, anchor = a * block_size + k, int(anchors[s, a])
        if anchor < 0:
            assert blocks.weights[s, row] == 0
            continue
        assert prompts[s] - 1 <= anchor < lengths[s] - 1
        left = min(int(kept[s, a]), lengths[s] - 2 - anchor)
        assert blocks.positions[s, row] == anchor + k
        assert blocks.ids[s, row] == (tokens[s, anchor + k] if k <= left else MASK)
        predicted = k > left and anchor + k < lengths[s]
        assert (blocks.weights[s, row] > 0) == predicted
        if predicted:
            assert blocks.labels[s, row] == tokens[s, anchor + k]
        sees = blocks.mask[s, row]
        assert sees[:width].nonzero().flatten().tolist() == list(range(anchor)), "features of the tokens before the anchor"
        assert sees[width:].tolist() == [True] * block_size, "its own block"


def test_weights_are_the_closed_form():
    tokens, lengths = answers([20])
    blocks = lay_blocks(tokens, lengths, torch.tensor([[3, 16, -1]]), torch.tensor([[1, 0, 0]]), 5, MASK, tau=2.0)
    weights = blocks.weights.view(3, 5)
    full = torch.exp(-torch.arange(3) / 2.0)
    torch.testing.assert_close(weights[0], torch.cat([torch.zeros(2), full / full.sum()]))
    torch.testing.assert_close(weights[1], torch.cat([torch.zeros(1), full / full.sum(), torch.zeros(1)]))  # the answer ends
    assert not weights[2].any()


def test_dflash_is_the_vp_objective_with_nothing_kept():
    tokens, lengths = answers([12, 9])
    anchors = torch.tensor([[2, 5], [1, 4]])
    blocks = lay_blocks(tokens, lengths, anchors, torch.zeros_like(anchors), 4, MASK, 4.0)
    ids = blocks.ids.view(2, 2, 4)
    assert (ids[..., 0] == tokens.gather(1, anchors)).all()
    assert (ids[..., 1:] == MASK).all()


@pytest.mark.parametrize("beta", [0.5, 0.8, 1.0])
def test_kept_lengths_follow_their_distribution(beta):
    kept = sample_kept((100, 300), 5, beta, torch.Generator().manual_seed(0))
    found = torch.bincount(kept.flatten(), minlength=4) / kept.numel()
    expected = torch.tensor([beta**j for j in range(4)])
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.01, rtol=0)


def test_anchors_are_drawn_without_replacement_and_evenly():
    counts = torch.zeros(10)
    g = torch.Generator().manual_seed(1)
    for _ in range(3000):
        drawn = sample_anchors(torch.tensor([3]), torch.tensor([10]), 4, g)[0]
        assert len(set(drawn.tolist())) == 4
        counts[drawn] += 1
    torch.testing.assert_close(counts[2:9] / 3000, torch.full((7,), 4 / 7), atol=0.04, rtol=0)
    assert counts[:2].sum() == counts[9:].sum() == 0
    assert sorted(sample_anchors(torch.tensor([3, 3]), torch.tensor([5, 6]), 9, g)[0].tolist()) == [-1, 2, 3]


def test_what_a_lookup_gets_right_weighs_less():
    tokens, lengths = answers([20])
    anchors = torch.tensor([[3, 9, -1]])
    blocks = lay_blocks(tokens, lengths, anchors, torch.tensor([[1, 0, 0]]), 5, MASK, tau=2.0)
    found = discount(blocks, torch.tensor([[2, 0, 7]]), 0.25)
    factors = torch.tensor([[1, 1, 0.25, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(found.weights.view(3, 5), blocks.weights.view(3, 5) * factors)
    assert torch.equal(found.labels, blocks.labels)
