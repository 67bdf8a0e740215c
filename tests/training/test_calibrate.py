"""Calibration: what is fitted, what is measured."""

import torch

from tests.training.test_train import target, trainer  # noqa: F401 (a fixture)
from training.calibrate import ENOUGH, GRID, calibration_error, fit, observe


def test_the_error_is_the_mean_gap_between_promise_and_truth():
    confidence = torch.tensor([0.05, 0.05, 0.95, 0.95, 0.95, 0.95])
    right = torch.tensor([False, False, True, True, True, False])
    assert abs(calibration_error(confidence, right) - (2 * 0.05 + 4 * 0.2) / 6) < 1e-6
    assert calibration_error(confidence[:0], right[:0]) == 0.0


def test_the_temperature_that_the_truth_was_drawn_at_is_found():
    """Confidences are right at another temperature at each place; the third has too few observations."""
    generator = torch.Generator().manual_seed(0)
    logits = 1 + 3 * torch.rand(12000, generator=generator)
    confidence = torch.sigmoid(logits[:, None] / GRID)
    true = torch.tensor([26, 6, 14])
    depth = torch.arange(12000) % 2 + 1
    depth[: ENOUGH // 2] = 3
    right = torch.rand(12000, generator=generator) < confidence.gather(1, true[depth - 1][:, None]).squeeze(1)
    found = fit(depth, confidence, right, 4)
    assert (found[:2] - true[:2]).abs().max() <= 2
    assert found[2] == found[3] == found[1]
    after = confidence.gather(1, found[depth - 1][:, None]).squeeze(1)
    assert calibration_error(after[depth < 3], right[depth < 3]) < 0.02
    assert calibration_error(confidence[:, len(GRID) // 2][depth < 3], right[depth < 3]) > 0.03


def test_only_places_behind_accepted_tokens_are_observed(target, tmp_path):  # noqa: F811
    """Behind a wrong token of the block nothing counts, as nothing behind it can be accepted."""
    made = trainer(target, tmp_path, steps=30, learning_rate=0.03)
    made.run()
    held_out = made.data.held_out
    depth, confidence, right = observe(made.drafting, made.data, 0, held_out)
    assert confidence.shape == (len(depth), len(GRID))
    assert ((confidence > 0) & (confidence <= 1)).all()
    for place in (1, 2):  # each right token is followed by one observation more, unless the answer ends there
        assert (depth == place + 1).sum() <= right[depth == place].sum()
        assert (depth == place + 1).sum() >= right[depth == place].sum() - len(held_out)
    assert 0 < right.float().mean() < 1


def test_a_second_drafter_is_observed_behind_the_first_ones_rejections(target, tmp_path, monkeypatch):  # noqa: F811
    first = trainer(target, tmp_path / "first", steps=10)
    first.run()
    vp = trainer(target, tmp_path / "vp", first=tmp_path / "first", start=tmp_path / "first")
    batch = vp.next_batch()
    anchors = torch.arange(2, 7).expand(len(batch.lengths), -1).contiguous()
    monkeypatch.setattr("training.calibrate.sample_anchors", lambda *_: anchors)
    monkeypatch.setattr(vp.data, "load", lambda *_: batch)
    _, refused, _ = vp.drafting.first_draft(batch, anchors)
    depth, _, _ = observe(vp.drafting, vp.data, 0, [])
    assert (refused >= 0).any()
    assert (depth == 1).sum() == (refused >= 0).sum()
