"""A target's weights in the form that ``engine.weights`` asks for, and what that costs.

Matrices are rounded by ``gguf`` to GGUF's own types, which ``export/blocks.py`` reads; those that the file holds in as many
bits already are left alone. The cost is taken on the f32 model's own greedy answers to held-out prompts, from the weights
themselves: it is the same whatever runtime serves them, and what a runtime rounds besides is not in it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.blocks import BlockEmbedding, BlockLinear, Blocks, Find, blocks_of_file, place_blocks, quantised_types, rounded
from export.checkpoints import load_target
from export.config import Weights
from export.ends import end_ids
from export.prompts import Prompt, chat_ids, first_of_each_task, read_prompts

Form = Literal["int8", "int4"]
BITS: dict[Form, int] = {"int8": 8, "int4": 4}
# What ``auto`` takes where no blocks lie in the file, and the KL from f32 in nats a token up to which it does: docs/engines.md.
AUTO: Form = "int8"
LIMIT = 0.005
BLOCK = 32  # weights that share a scale
PROMPT, ANSWER = 256, 48  # tokens of a prompt and of its answer, at most; a prompt a task


@dataclass(frozen=True)
class Cost:
    """How far a form of the weights is from f32: mean KL in nats a token, and how often the likeliest token is the same."""

    kl: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return f"KL from f32 {self.kl:.2g} nats a token, likeliest token the same at {self.agreement:.1%} of {self.tokens}"


def held_out_prompts(files: Sequence[Path]) -> list[Prompt]:
    """The shortest prompt of each task."""
    return first_of_each_task(sorted(read_prompts(files), key=lambda prompt: len(prompt.turns[0])), 1)


class HeldOut:
    """A model's greedy answers to held-out prompts, and its distributions there.

    Args:
        model: in f32. folder: with its tokenizer. prompts: JSONL files.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, prompts: Sequence[Path]) -> None:
        # Not AutoTokenizer: a class that is declared may replace parts of tokenizer.json, whose ids are the target's.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        given = []
        for prompt in held_out_prompts(prompts):
            text = prompt.turns[0]
            ids = chat_ids(tokenizer, [text]) if tokenizer.chat_template else tokenizer(text)["input_ids"]
            given.append(torch.tensor(ids[-PROMPT:]))
        self._starts = [len(ids) for ids in given]
        padded = nn.utils.rnn.pad_sequence(given, batch_first=True, padding_side="left")
        width = padded.shape[1]
        seen = (torch.arange(width) >= width - torch.tensor(self._starts)[:, None]).long()
        ends = end_ids(folder, model.config.vocab_size)
        options: dict[str, Any] = {
            "max_new_tokens": ANSWER,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": ends or None,
        }
        with torch.no_grad():
            said: Tensor = model.generate(padded, attention_mask=seen, **options)  # type: ignore[operator]
        self._sequences = [torch.cat([ids, _until(answer, ends)]) for ids, answer in zip(given, said[:, width:], strict=True)]
        self._said = self._distributions(model)

    def cost(self, model: PreTrainedModel) -> Cost:
        """Of a model that should say the same."""
        said, found = self._said, self._distributions(model)
        kl = (said.exp() * (said - found)).sum(-1).mean()
        same = (said.argmax(-1) == found.argmax(-1)).double().mean()
        return Cost(float(kl), float(same), len(said))

    def _distributions(self, model: PreTrainedModel) -> Tensor:
        """Log-probabilities of every answer token, f64 ``[tokens, V]``."""
        # Padded behind: a causal model does not see it.
        padded = nn.utils.rnn.pad_sequence(self._sequences, batch_first=True)
        with torch.no_grad():
            hidden = model.get_decoder()(padded).last_hidden_state
            places = [
                hidden[i, start - 1 : len(ids) - 1]
                for i, (start, ids) in enumerate(zip(self._starts, self._sequences, strict=True))
            ]
            logits = model.get_output_embeddings()(torch.cat(places))
        return torch.log_softmax(logits.double(), -1)


def _until(answer: Tensor, ends: Sequence[int]) -> Tensor:
    """An answer up to the token that ends it, which is the last to be kept."""
    found = torch.isin(answer, torch.tensor(ends, dtype=torch.int64)).nonzero()
    return answer[: int(found[0]) + 1] if len(found) else answer


def rounder(form: Form) -> Find:
    """Every matrix in blocks: of Q8_0, or for int4 of Q4_1.

    An embedding has 8 bits in either: its rows are looked up, not multiplied, and a row of codes is stored in bytes.
    """

    def find(_name: str, module: nn.Linear | nn.Embedding) -> Blocks | None:
        if getattr(module, "bias", None) is not None:
            return None
        wide = form == "int8" or isinstance(module, nn.Embedding)
        kind = GGMLQuantizationType.Q8_0 if wide else GGMLQuantizationType.Q4_1
        return rounded(module.weight.detach().numpy(), kind)

    return find


def in_blocks(
    folder: Path, gguf: Path | None, weights: Weights, prompts: Sequence[Path]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a target with its weights in the form asked for, for export only; prints what was done.

    Args:
        folder: a directory that ``open_target`` returned. gguf: the file that it was converted from, if it was.
        prompts: held-out, JSONL.

    Returns:
        The model, and what the build keeps of its weights: ``form``; ``kl``, ``agreement`` and ``tokens`` where they were
        rounded.

    Raises:
        PromptError: the cost has to be taken, and the prompts cannot be read.
    """
    model, types = load_target(folder), quantised_types(gguf)
    if form := rounded_to(weights, types):
        held_out = HeldOut(model, folder, prompts)
        kept = {4, 8} if weights == "auto" else {BITS[form]}
        of_file, anew = blocks_of_file(model, gguf) if gguf else _none, rounder(form)

        def find(name: str, module: nn.Linear | nn.Embedding) -> Blocks | None:
            lies = of_file(name, module)
            return lies if lies and lies.bits in kept else anew(name, module)

        left = place_blocks(model, find)
        if not any(isinstance(module, BlockLinear | BlockEmbedding) for module in model.modules()):
            print(f"weights in f32: blocks of {BLOCK} divide none of their widths", flush=True)
            return model, {"form": "f32"}
        cost = held_out.cost(model)
        if weights != "auto" or cost.kl <= LIMIT:
            if others := sorted(name for name, bits in types.items() if bits not in kept):
                print(f"requantised to {form}: {', '.join(others)}")
            if left:
                print(f"left in f32, since blocks of {BLOCK} do not divide their width: {', '.join(left)}")
            print(f"weights in {form}: {cost}", flush=True)
            return model, {"form": form, **asdict(cost)}
        where = ", where the file has no blocks that are served" if any(types.values()) else ""
        print(f"weights in f32{where}: in {form} {cost}, and auto allows {LIMIT} nats", flush=True)
        model = load_target(folder)
    if weights == "f32" or gguf is None or not any(types.values()):
        return model, {"form": "f32"}
    place_blocks(model, blocks_of_file(model, gguf))
    return model, {"form": "+".join(sorted(types))}


def rounded_to(weights: Weights, types: dict[str, int | None]) -> Form | None:
    """What a target is rounded to, if it is: ``auto`` leaves a file alone whose quantised matrices can all be served.

    Args:
        types: of the file that it was converted from, by ``quantised_types``.
    """
    if weights == "auto":
        return None if types and all(types.values()) else AUTO
    return None if weights == "f32" else weights


def _none(_name: str, _module: nn.Linear | nn.Embedding) -> None:
    """Of a checkpoint that holds no blocks."""
