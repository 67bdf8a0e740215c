"""Validation: how many tokens drafters win on held-out answers."""

from functools import cached_property

import torch
from torch import Tensor

from decoding import best_first, sources
from decoding.acceptance import walk
from decoding.calibration import Calibration
from decoding.drafts import Draft
from export.drafter import CANDIDATES
from training.blocks import sample_anchors
from training.data import Batch, Data
from training.drafting import Drafting
from training.losses import ban, leading
from training.precision import precision

ANSWERS = 128  # held-out answers at most, spread over the corpus
ANCHORS = 32  # of each
TREE = 12  # rows of the tree that is grown


class Validation:
    """Held-out greedy answers, and what drafters make of them."""

    def __init__(self, drafting: Drafting, data: Data) -> None:
        self.drafting, self.data, self.device = drafting, data, drafting.device

    @cached_property
    def batches(self) -> list[tuple[Batch, Tensor]]:
        """Held-out greedy answers and anchors of each, ``[S, A]``: the same at every validation, so that they are kept."""
        held_out = [i for i in self.data.held_out if self.data.answers[i].temperature == 0]
        held_out = held_out[:: -(-len(held_out) // ANSWERS) or 1]
        found = []
        for start in range(0, len(held_out), 8):
            with precision(self.device):
                batch = self.data.load(held_out[start : start + 8], f"validate/{start}", self.device)
            anchors = sample_anchors(batch.prompt_lengths.cpu(), batch.lengths.cpu(), ANCHORS, batch.generator)
            found.append((batch, anchors.to(self.device)))
        return found

    @torch.no_grad()
    def lengths(self) -> dict[str, float]:
        """Acceptance length on held-out greedy answers, every anchor counting the same.

        For DFlash the tokens of its own block, and those of its best-first tree of ``TREE`` rows; for a VP-Drafter those of
        both drafters, its exclusive redraft at the first one's rejection counted whether or not that boundary would have been
        selected.
        """
        won, grown, count = 0, 0, 0
        with precision(self.device):
            for batch, anchors in self.batches:
                accepted, refused, draft = self.drafting.first_draft(batch, anchors, 1 if self.drafting.first else CANDIDATES)
                count += int((anchors >= 0).sum())
                won += int((accepted + 1)[anchors >= 0].sum())
                if self.drafting.first is not None:
                    won += int(self.redraft_gain(batch, anchors, accepted, refused).sum())
                else:
                    grown += int((tree_gain(batch, anchors, draft) + 1)[anchors >= 0].sum())
        lengths = {"acceptance_length": won} | ({} if self.drafting.first else {"tree_length": grown})
        return {name: round(tokens / max(count, 1), 4) for name, tokens in lengths.items()}

    def redraft_gain(self, batch: Batch, anchors: Tensor, accepted: Tensor, refused: Tensor) -> Tensor:
        """Tokens ``[S, A]`` that the student's redraft adds behind the first drafter's rejection."""
        student, missed = self.drafting.student, (refused >= 0) & (anchors >= 0)
        blocks, banned = self.drafting.redraft(batch, anchors, accepted, refused)
        rows = blocks.weights > 0
        said = ban(student.logits(batch.features, blocks, rows).float(), banned[rows]).argmax(-1)
        gamma = int(student.config.block_size)
        right = torch.zeros_like(rows)
        right[rows] = student.draft_ids[said] == blocks.labels[rows]
        k = torch.arange(gamma, device=self.device)
        right = right.view(*anchors.shape, gamma) | (k <= accepted[..., None])
        return (leading(right) - 1 - accepted).clamp(min=0) * missed


def tree_gain(batch: Batch, anchors: Tensor, draft: Draft) -> Tensor:
    """Tokens ``[S, A]`` that a best-first tree of ``TREE`` rows, anchor included, gains from a first draft's marginals."""
    positions = anchors.clamp(min=0)[..., None] + 1 + torch.arange(draft.tokens.shape[1] + 1, device=anchors.device)
    within = positions < batch.lengths[:, None, None]
    truth = batch.tokens.gather(1, positions.clamp(max=batch.tokens.shape[1] - 1).flatten(1)).view_as(positions)
    said = torch.where(within, truth, -2).flatten(0, 1).cpu().numpy()  # behind the end: what no tree holds
    draft = Draft([], *(x.cpu().numpy() for x in (draft.anchors, draft.candidates, draft.probabilities)))
    tree = best_first.grow(draft.anchors, [sources.first(draft)], TREE, Calibration().factors)
    nodes, _ = walk(tree, lambda depth, _: said[:, depth])
    return torch.from_numpy((nodes > 0).sum(1)).view(anchors.shape).to(anchors.device)
