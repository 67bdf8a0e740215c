"""The corpus: prompts answered by the target itself. Drafters learn the target's words, not those of a data set."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """One line of a corpus: the target's answer to a prompt, both as token ids, the end token included."""

    id: str
    task: str
    prompt_ids: list[int]
    response_ids: list[int]
    temperature: float

    @property
    def tokens(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def read_corpus(path: Path) -> list[Answer]:
    """Read a corpus (JSONL). A last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is not an answer.
    """
    return list(_read(path))


def _read(path: Path) -> Iterator[Answer]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                raw = json.loads(line)
                answer = Answer(raw["id"], raw["task"], raw["prompt_ids"], raw["response_ids"], raw["temperature"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not an answer ({error!r})") from None
            if answer.prompt_ids and len(answer.response_ids) > 1:
                yield answer
