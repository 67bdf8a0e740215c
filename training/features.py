"""What the target thinks of a corpus: its features at every token, and the last hidden state, whose product with the head is
what it says next.

Computed in one pass over each answer when it is first asked for, and kept on disk for the epochs after it:
on a CPU the target's pass over an answer costs about half of the drafter's training step on it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.corpus import Answer

TOGETHER = 2048  # tokens in a pass of the target, about


def cache_folder(target: str, layers: Sequence[int], answers: Sequence[Answer]) -> Path:
    """Where training keeps a corpus' features. A corpus grows at its end, so that its first answer tells it from others."""
    first = hashlib.sha256(np.array(answers[0].tokens, dtype=np.int64).tobytes()).hexdigest()[:12]
    return Path("build/training/features") / f"{target}-{'-'.join(map(str, layers))}-{first}"


class Features:
    """Features of a corpus, computed on first use.

    Args:
        answers: the corpus. It may grow at its end between runs; what was computed stays valid.
        target: a transformers model in eval mode, on the device where it shall run.
        layers: ids of the layers whose outputs are joined (``hidden_states[id + 1]``).
        cache: folder for the file of computed rows, bf16; None recomputes them each time.
    """

    def __init__(self, answers: Sequence[Answer], target: PreTrainedModel, layers: Sequence[int], cache: Path | None) -> None:
        self.answers = answers
        self.target = target
        self.layers = tuple(layers)
        self.features = len(self.layers) * target.config.hidden_size
        self.width = self.features + target.config.hidden_size  # the last hidden state behind the features
        self.starts = np.concatenate([[0], np.cumsum([len(a) for a in answers])])
        self.rows: Tensor | None = None
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            total = int(self.starts[-1])
            self.rows = torch.from_file(
                str(cache / "rows.bf16"), shared=True, size=total * self.width, dtype=torch.bfloat16
            ).view(total, self.width)
            self.known = torch.from_file(str(cache / "known.u8"), shared=True, size=len(answers), dtype=torch.uint8)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return features ``[S, L, F]`` of some answers, bf16, zero beyond each one's length."""
        return self._rows(indices, slice(0, self.features))

    def last(self, indices: Sequence[int]) -> Tensor:
        """Return normed last hidden states ``[S, L, H]`` of some answers, bf16, zero beyond each one's length."""
        return self._rows(indices, slice(self.features, self.width))

    def _rows(self, indices: Sequence[int], columns: slice) -> Tensor:
        missing = [i for i in indices if self.rows is None or not self.known[i]]
        computed = self._compute(missing)
        if self.rows is not None:
            for i, values in computed.items():
                self.rows[self._span(i)] = values
                self.known[i] = 1
        out = torch.zeros(
            len(indices), max(len(self.answers[i]) for i in indices), columns.stop - columns.start, dtype=torch.bfloat16
        )
        for row, i in enumerate(indices):
            values = computed[i] if self.rows is None else self.rows[self._span(i)]
            out[row, : len(values)] = values[:, columns]
        return out

    def _span(self, i: int) -> slice:
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    @torch.no_grad()
    def _compute(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """Answers of like length go together. Causal attention never looks right: padding at the right needs no mask."""
        computed = {}
        waiting = sorted(indices, key=lambda i: len(self.answers[i]))
        while waiting:
            count = max(1, TOGETHER // len(self.answers[waiting[-1]]))
            chosen, waiting = waiting[-count:], waiting[:-count]
            tokens = torch.zeros(len(chosen), len(self.answers[chosen[-1]]), dtype=torch.int64)
            for row, i in enumerate(chosen):
                tokens[row, : len(self.answers[i])] = torch.tensor(self.answers[i].tokens)
            passed = self.target.base_model(tokens.to(self.target.device), use_cache=False, output_hidden_states=True)
            hidden = [passed.hidden_states[layer + 1] for layer in self.layers] + [passed.last_hidden_state]
            joined = torch.cat(hidden, dim=-1).to(torch.bfloat16).cpu()
            for row, i in enumerate(chosen):
                computed[i] = joined[row, : len(self.answers[i])]
        return computed
