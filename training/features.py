"""What the target says of a corpus: its features at every token, and its likeliest tokens at every answer token.

Computed in one pass over each answer when it is first asked for, and kept on disk for the epochs after it:
on a CPU the target's pass over an answer costs more than the drafter's training step on it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.corpus import Answer


class Features:
    """Features of a corpus, computed on first use.

    Args:
        answers: the corpus. It may grow at its end between runs; what was computed stays valid.
        target: a transformers model in eval mode, on the device where it shall run.
        layers: ids of the layers whose outputs are joined (``hidden_states[id + 1]``).
        cache: folder for the file of computed features, bf16; None recomputes them each time.
    """

    def __init__(self, answers: Sequence[Answer], target: PreTrainedModel, layers: Sequence[int], cache: Path | None) -> None:
        self.answers = answers
        self.target = target
        self.layers = tuple(layers)
        self.width = len(self.layers) * target.config.hidden_size
        self.starts = np.concatenate([[0], np.cumsum([len(a) for a in answers])])
        self.rows: Tensor | None = None
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            total = int(self.starts[-1])
            self.rows = torch.from_file(
                str(cache / "features.bf16"), shared=True, size=total * self.width, dtype=torch.bfloat16
            ).view(total, self.width)
            self.known = torch.from_file(str(cache / "known.u8"), shared=True, size=len(answers), dtype=torch.uint8)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return features ``[S, L, F]`` of some answers, bf16, zero beyond each one's length."""
        out = torch.zeros(len(indices), max(len(self.answers[i]) for i in indices), self.width, dtype=torch.bfloat16)
        missing = [i for i in indices if self.rows is None or not self.known[i]]
        if missing:
            computed = dict(zip(missing, self._compute(missing), strict=True))
        for row, i in enumerate(indices):
            span = slice(int(self.starts[i]), int(self.starts[i + 1]))
            if i in missing:
                values = computed[i]
                if self.rows is not None:
                    self.rows[span] = values
                    self.known[i] = 1
            else:
                assert self.rows is not None
                values = self.rows[span]
            out[row, : len(values)] = values
        return out

    @torch.no_grad()
    def _compute(self, indices: Sequence[int]) -> list[Tensor]:
        """Causal attention never looks right, so padding at the right needs no mask."""
        lengths = [len(self.answers[i]) for i in indices]
        tokens = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        for row, i in enumerate(indices):
            tokens[row, : lengths[row]] = torch.tensor(self.answers[i].tokens)
        hidden = self.target.base_model(tokens.to(self.target.device), use_cache=False, output_hidden_states=True).hidden_states
        joined = torch.cat([hidden[layer + 1] for layer in self.layers], dim=-1).to(torch.bfloat16).cpu()
        return [joined[row, :length] for row, length in enumerate(lengths)]
