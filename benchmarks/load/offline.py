"""What the target answers by itself: each prompt alone, plain decoding, no server."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from decoding.cycle import Decoder
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.build_directory import BuildDirectory
from triton_repo import text


class Offline:
    """The answers to some prompts.

    Args:
        tokens: of an answer, at most. A shorter answer is the beginning of it.
    """

    def __init__(self, build: Path, prompts: Iterable[tuple[str, list[int]]], tokens: int) -> None:
        directory = BuildDirectory.open(build)
        target, _, _ = directory.load()
        manifest = directory.manifest
        decoder = Decoder(
            target,
            None,
            None,
            mode="autoregressive",
            block_size=manifest["decoding"]["block_size"],
            branches=manifest["decoding"]["branches"],
            vocabulary=directory.vocabulary,
        )
        scheduler = Scheduler(decoder, 1)
        self.vocabulary = text.Vocabulary(Tokenizer.from_file(str(directory.tokenizer / "tokenizer.json")))
        self.answers: dict[str, list[int]] = {}
        for prompt, ids in prompts:
            sequence = Sequence(ids, tokens, end_ids=frozenset(manifest["end_ids"]))
            scheduler.add(sequence)
            while scheduler:
                scheduler.step()
            self.answers[prompt] = sequence.answer[:-1] if sequence.finish == "end" else sequence.answer

    def text(self, prompt: str, tokens: int) -> str:
        """The answer of at most so many tokens."""
        return text.Growing(self.vocabulary).add(self.answers[prompt][:tokens], final=True)
