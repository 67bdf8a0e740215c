"""What clients send, and what they see of the answer, and when."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from client import AsyncClient, Message, Options, Piece, ServiceError
from export.prompts import read_prompts
from triton_repo.prompt import Prompts

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "training" / "prompts" / "train.jsonl"


class Texts:
    """Text of a wanted length that nobody has sent before, cut from the training prompts.

    Args:
        prompts: of the build, whose tokens are counted.
    """

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self.prompts, self.random = prompts, random.Random(seed)
        turns = [turn for prompt in read_prompts([PROMPTS]) for turn in prompt.turns]
        self.words = " ".join(self.random.sample(turns, 2000)).split()

    def take(self, tokens: int) -> str:
        """Text of so many tokens, or a few less."""
        start = self.random.randrange(len(self.words))
        words = (self.words[start:] + self.words)[:tokens]
        while len(self.prompts.text(" ".join(words))) > tokens:
            excess = len(self.prompts.text(" ".join(words))) - tokens
            del words[-max(1, excess // 3) :]
        return " ".join(words)


@dataclass
class Outcome:
    """What a client saw of an answer.

    Attributes:
        began: by ``time.monotonic()``. at: when each piece came, in seconds after that. tokens: of the answer, by then.
        finish: the answer's, or ``left``, or ``refused``.
    """

    began: float
    at: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds until the first piece."""
        return self.at[0]

    @property
    def whole(self) -> float:
        """Seconds until the answer was there."""
        return self.at[-1]

    def gaps(self, since: float = 0.0) -> list[float]:
        """Seconds between pieces, those that ended after ``since`` seconds."""
        return [b - a for a, b in zip(self.at, self.at[1:], strict=False) if b > since]


async def ask(
    client: AsyncClient,
    prompt: str | list[Message],
    options: Options,
    leave_after: float | None = None,
    seen: Outcome | None = None,
) -> Outcome:
    """Stream an answer; leave after some seconds if told to. ``seen`` is filled as the answer comes."""
    outcome = seen or Outcome(time.monotonic())
    outcome.began = time.monotonic()

    async def read(pieces: AsyncIterator[Piece]) -> None:
        async for piece in pieces:
            outcome.at.append(time.monotonic() - outcome.began)
            outcome.tokens.append(piece.output_tokens)
            outcome.text += piece.text
            outcome.finish = piece.finish_reason

    try:
        await asyncio.wait_for(read(client.stream(prompt, options)), leave_after)
    except asyncio.TimeoutError:
        outcome.finish = "left"
    except ServiceError as error:
        outcome.finish, outcome.error = "refused", str(error)
    return outcome
