"""Prompts: read from files, or invented by the target itself; none that overlaps what it is evaluated on."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from export.config import UserError

OVERLAP = 13  # words in a row that a training prompt may not share with an evaluation prompt

# How a user's message begins, by task; the target writes on from there. No space at the end: it belongs to the next token.
OPENINGS: dict[str, Sequence[str]] = {
    "chat": ("", "What", "How can I", "Why", "Tell me about", "Write a story about", "Compose an email to"),
    "qa": ("Who", "When", "Where", "What is the", "Which", "How many", "How long"),
    "math": ("A train", "If", "How many", "There are", "Calculate", "Solve"),
    "code": ("Write a Python function that", "Write a program that", "Fix this code:\n", "```python\ndef"),
    "rewriting": ("Rewrite the following text", "Make this more concise:", "Paraphrase:"),
    "extraction": ("Extract", "List all names in this text:", "Based on the passage, answer the question.\n"),
    "summarization": ("Summarize:", "Summarize the following article in one sentence.\n"),
    "translation": ("Translate German to English:", "Translate to French:", "Translate this into Spanish:"),
}


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


def grams(text: str) -> set[tuple[str, ...]]:
    """All runs of ``OVERLAP`` words of a text, case folded."""
    words = text.casefold().split()
    return {tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}


def without_overlap(prompts: Iterable[Prompt], evaluation: Iterable[Prompt]) -> list[Prompt]:
    """Drop prompts that share ``OVERLAP`` words in a row with an evaluation prompt, or say all that one says."""
    evaluated = list(evaluation)
    forbidden = {gram for prompt in evaluated for turn in prompt.turns for gram in grams(turn)}
    whole = {" ".join(turn.casefold().split()) for prompt in evaluated for turn in prompt.turns}
    return [
        prompt
        for prompt in prompts
        if not any(grams(turn) & forbidden or " ".join(turn.casefold().split()) in whole for turn in prompt.turns)
    ]


def chat_ids(tokenizer: PreTrainedTokenizerBase, history: Sequence[str]) -> list[int]:
    """Token ids of a conversation whose last turn is the user's, up to the opening of the target's answer."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(history)]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def opening_ids(tokenizer: PreTrainedTokenizerBase, opening: str) -> list[int]:
    """Token ids of a conversation that breaks off in the user's first message, behind its opening words."""
    mark = "\u2063mark\u2063"
    messages = [{"role": "user", "content": mark}]
    before, _, _ = str(tokenizer.apply_chat_template(messages, tokenize=False)).partition(mark)
    return tokenizer(before + opening, add_special_tokens=False)["input_ids"]
