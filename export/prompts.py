"""Prompts on disk: what a target is asked where its answers are looked at, not served."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from export.config import UserError


class PromptError(UserError):
    """A file of prompts cannot be used; the message names the line."""


@dataclass(frozen=True)
class Prompt:
    """What is asked: the turns of a conversation, one after the other."""

    id: str
    task: str
    turns: tuple[str, ...]


def read_prompts(files: Iterable[Path]) -> list[Prompt]:
    """Read prompts (JSONL: id, task, turns).

    Raises:
        PromptError: a file is missing, or a line is not a prompt.
    """
    return [prompt for file in files for prompt in _read(file)]


def first_of_each_task(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """At most ``count`` prompts of every task, in their order."""
    taken: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        of_task = taken.setdefault(prompt.task, [])
        if len(of_task) < count:
            of_task.append(prompt)
    return [prompt for of_task in taken.values() for prompt in of_task]


def chat_ids(tokenizer: PreTrainedTokenizerBase, history: Sequence[str]) -> list[int]:
    """Token ids of a conversation whose last turn is the user's, up to the opening of the target's answer."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(history)]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _read(file: Path) -> Iterator[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a text may hold other ends of line
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            raw = json.loads(line)
            turns = tuple(raw["turns"])
            if not turns or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError("turns: allowed: a list of texts")
            yield Prompt(str(raw["id"]), str(raw["task"]), turns)
        except (ValueError, KeyError, TypeError) as error:
            raise PromptError(f"{file}:{number}: not a prompt ({error!r}); allowed: id, task, turns") from None
