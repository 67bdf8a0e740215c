"""Training blocks as a drafter learns from them, and what drafters make of them."""

import torch
from torch import Tensor

from decoding.drafts import Draft
from export.config import TrainingSection
from training.blocks import Blocks, lay_blocks, sample_kept
from training.data import Batch
from training.losses import leading, likeliest
from training.student import Student


class Drafting:
    """A drafter that is trained and, if it is a VP-Drafter, the first drafter that it follows.

    Args:
        student: the drafter. first: the trained first drafter, whose rejections a VP-Drafter learns from; None if the student
            is DFlash itself.
    """

    def __init__(self, student: Student, first: Student | None, options: TrainingSection, device: torch.device) -> None:
        self.student, self.first, self.device = student, first, device
        self.beta, self.tau = options.beta, options.tau

    def lay(self, batch: Batch, anchors: Tensor, rejections: float) -> tuple[Blocks, Tensor]:
        """Blocks to train on, and the draft index that each place may not say, ``[S, N]``, or -1.

        A VP-Drafter's block keeps l ∝ β^l true tokens or, as often as ``rejections`` says, what the first drafter got
        right at this anchor; then the token that it got wrong there is banned, since an exclusive redraft bans it.
        """
        gamma, mask_id, tau = int(self.student.config.block_size), self.student.mask_id, self.tau
        kept, refused = torch.zeros_like(anchors), torch.full_like(anchors, -1)
        if self.first is not None:
            kept = sample_kept(tuple(anchors.shape), gamma, self.beta, batch.generator).to(self.device)
            if rejections > 0:
                accepted, refused, _ = self.first_draft(batch, anchors)
                real = (torch.rand(anchors.shape, generator=batch.generator).to(self.device) < rejections) & (refused >= 0)
                kept, refused = torch.where(real, accepted, kept), torch.where(real, refused, -1)
        blocks = lay_blocks(batch.tokens, batch.lengths, anchors, kept, gamma, mask_id, tau)
        return blocks, self.banned(kept, refused)

    @torch.no_grad()
    def first_draft(self, batch: Batch, anchors: Tensor, width: int = 1) -> tuple[Tensor, Tensor, Draft]:
        """What the first drafter makes of each block.

        Args:
            width: W, candidates of each place.

        Returns:
            accepted ``[S, A]``: leading tokens that are right; refused ``[S, A]``: the first wrong one, -1 if the block
            or the answer ended before; the draft of S·A blocks, γ-1 places and W candidates.
        """
        first = self.first or self.student
        gamma = int(first.config.block_size)
        blocks = lay_blocks(batch.tokens, batch.lengths, anchors, torch.zeros_like(anchors), gamma, first.mask_id, 1.0)
        drafted = (torch.arange(blocks.ids.shape[1], device=self.device) % gamma > 0).expand_as(blocks.ids)
        probabilities, best = likeliest(first.hidden(batch.features, blocks, drafted), first.head, width)
        shape = (*anchors.shape, gamma - 1)
        candidates = first.draft_ids[best].view(*shape, width)
        tokens = candidates[..., 0]
        known = (blocks.weights > 0)[drafted].view(shape)
        accepted = leading((tokens == blocks.labels[drafted].view(shape)) & known)
        place = accepted.clamp(max=gamma - 2)[..., None]
        missed = (accepted < gamma - 1) & known.gather(2, place).squeeze(2)
        refused = torch.where(missed, tokens.gather(2, place).squeeze(2), -1)
        probabilities = probabilities.view(*shape, width)
        return accepted, refused, Draft([], anchors.flatten(), candidates.flatten(0, 1), probabilities.flatten(0, 1))

    def redraft(self, batch: Batch, anchors: Tensor, accepted: Tensor, refused: Tensor) -> tuple[Blocks, Tensor]:
        """Blocks kept up to the first drafter's rejections, and the draft index banned at each place ``[S, N]``, or -1."""
        gamma = int(self.student.config.block_size)
        blocks = lay_blocks(batch.tokens, batch.lengths, anchors, accepted, gamma, self.student.mask_id, 1.0)
        return blocks, self.banned(accepted, torch.where(anchors >= 0, refused, -1))

    def banned(self, kept: Tensor, refused: Tensor) -> Tensor:
        """The draft index that each place may not say, ``[S, N]``, or -1: behind ``kept`` tokens the one of token ``refused``,
        both ``[S, A]``, or of none that is -1."""
        gamma = int(self.student.config.block_size)
        index = torch.where(refused >= 0, self.student.to_draft[refused.clamp(min=0)], -1)
        places = torch.full((*kept.shape, gamma), -1, device=self.device)
        return places.scatter(2, (kept + 1).clamp(max=gamma - 1)[..., None], index[..., None]).flatten(1)
