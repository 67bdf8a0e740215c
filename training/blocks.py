"""Training blocks: one construction for both objectives, since DFlash is the VP-Drafter with nothing kept (docs/method.md §6).

A block stands at an anchor p of an answer: ``[t_p, t_{p+1} … t_{p+l}, MASK …]`` of γ tokens, the first l + 1 of them
true. It sees the target's features of the tokens before p and itself, in both directions. Its masked places are
trained to say the true tokens there. Many blocks of one answer share its features in one pass.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Blocks:
    """A blocks of γ tokens for each of S answers of up to L tokens; N = A·γ."""

    ids: Tensor  # [S, N] int64, inputs
    positions: Tensor  # [S, N] int64
    mask: Tensor  # [S, N, L + γ] bool: the features of the L tokens, then the tokens of a place's own block
    labels: Tensor  # [S, N] int64, the true token at each place; 0 where there is none
    weights: Tensor  # [S, N] f32, 0 where nothing is predicted; a block's weights sum to 1, or to 0 if it has no label


def sample_anchors(prompt_lengths: Tensor, lengths: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw anchors of each answer without replacement: ``[S, A]`` int64, A <= count, -1 where an answer has too few.

    The first anchor of an answer is its prompt's last token, the last one its token before last.
    """
    places = torch.arange(int(lengths.max()))
    allowed = (places >= prompt_lengths[:, None] - 1) & (places < lengths[:, None] - 1)
    keys = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1)
    drawn, anchors = keys.topk(min(count, int(allowed.sum(1).max())), dim=1)
    return anchors.masked_fill(drawn < 0, -1)


def sample_kept(shape: tuple[int, ...], block_size: int, beta: float, generator: torch.Generator) -> Tensor:
    """Draw how many tokens behind the anchor stay visible: Pr(l = j) ∝ β^j, j = 0 … γ-2. β = 0 is DFlash: always 0."""
    odds = torch.tensor([float(beta) ** j for j in range(block_size - 1)])
    total = int(torch.tensor(shape).prod())
    return torch.multinomial(odds, total, replacement=True, generator=generator).reshape(shape)


def lay_blocks(
    tokens: Tensor, lengths: Tensor, anchors: Tensor, kept: Tensor, block_size: int, mask_id: int, tau: float
) -> Blocks:
    """Build the blocks.

    Args:
        tokens: ``[S, L]`` int64, prompt and answer. lengths: ``[S]``.
        anchors: ``[S, A]`` int64; -1 makes a block without labels.
        kept: ``[S, A]`` int64, l of each block, 0 to γ-2. It is cut so that one label at least remains.
        tau: place k > l weighs exp(-(k - l - 1) / τ) within its block.
    """
    answers, width = tokens.shape
    valid = (anchors >= 0)[..., None]
    anchors = anchors.clamp(min=0)
    kept = torch.minimum(kept, (lengths[:, None] - 2 - anchors).clamp(min=0))[..., None]
    k = torch.arange(block_size, device=tokens.device)
    positions = anchors[..., None] + k  # [S, A, γ]
    within = positions < lengths[:, None, None]
    truth = tokens.gather(1, positions.clamp(max=width - 1).flatten(1)).view_as(positions)
    masked = k > kept
    ids = torch.where(masked, mask_id, truth)
    predicted = masked & within & valid
    weights = torch.exp(-(k - kept - 1) / tau) * predicted
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)

    before = torch.arange(width, device=tokens.device) < anchors.repeat_interleave(block_size, dim=1)[..., None]
    own = before.new_ones(answers, before.shape[1], block_size)
    return Blocks(
        ids=ids.flatten(1),
        positions=positions.flatten(1),
        mask=torch.cat([before, own], dim=-1),
        labels=torch.where(predicted, truth, 0).flatten(1),
        weights=weights.flatten(1),
    )


def discount(blocks: Blocks, runs: Tensor, weight: float) -> Blocks:
    """Let places that a lookup gets right anyway weigh less.

    Args:
        runs: ``[S, A]`` int64, how many tokens behind each block's anchor that are. weight: a factor.
    """
    gamma = blocks.ids.shape[1] // runs.shape[1]
    easy = torch.arange(gamma, device=runs.device) <= runs[..., None]
    return replace(blocks, weights=blocks.weights * torch.where(easy.flatten(1), weight, 1.0))
