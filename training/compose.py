"""``python -m training.compose pipeline.yaml --output FILE``: prompts of the kinds that collections lack, made of text that
is at hand.

Drafters are asked about long texts, in other languages, again and again in a conversation. What they learn from is mostly short
questions. So passages of other prompts and of the target's own answers (its corpus) are asked to be summarised, translated,
searched for an answer; a question gets a second turn; German sentences are built by a small grammar. Nothing here shares
13 words in a row with a prompt of the evaluation, and the same command writes the same file.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer

from export import checkpoints
from export.config import UserError, load
from export.prompts import Prompt, PromptError, read_prompts
from training import german
from training.corpus import read_corpus
from training.prompts import without_overlap

SHORT, LONG = 60, 420  # words of a passage
SUMS = "math"  # the task whose texts nobody summarises

SUMMARIZE = (
    "Summarize: {text}",
    "Summarize: {text}",
    "Summarize the following text:\n\n{text}",
    "Summarize the article below in two sentences.\n\n{text}",
    "{text}\n\nWhat are the main points of this text?",
    "{text}\n\nTL;DR:",
)
ASK = (
    "What does the text say about {name}?",
    "Who or what is {name}?",
    "Why is {name} mentioned?",
    "When does {name} appear?",
    "What is known about {name}?",
    "How is {name} connected with the rest of the text?",
)
QUESTIONS = (
    "Who is {name}?",
    "What is {name} known for?",
    "Where is {name}?",
    "When did {name} begin?",
    "Who played {name}?",
    "How old is {name}?",
    "Where does the name {name} come from?",
    "What does {name} mean?",
)
TRANSLATE = (
    "Translate English to German: {text}",
    "Translate English to French: {text}",
    "Translate English to Spanish: {text}",
    "Translate this sentence into German.\n{text}",
)
FOLLOW_UPS = (
    "Rewrite your previous response. Make it half as long.",
    "Rewrite your answer as a list of bullet points.",
    "Now do the same task again, but write it for a ten-year-old child.",
    "Summarize your last answer in one sentence.",
    "What assumptions have you made in your answer?",
    "Give three examples of what you just described.",
    "Can you explain your answer step by step?",
    "Which of these points matters most, and why?",
    "Write your previous reply as a short poem.",
    "Take your last response and turn it into an email.",
    "Check your answer for errors and correct them.",
    "What would you say to someone who disagrees?",
    "Continue.",
    "Change the names and places in your answer and write it again.",
    "How would the answer change if there were only half as much time?",
    "Output your previous reply in JSON format.",
)
NAME = re.compile(r"(?<![.!?\"“:] )(?<!^)\b(?:[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,}){0,2})\b")


def passages(texts: list[str]) -> list[str]:
    """What of some texts is long enough to be asked about: whole sentences, ``SHORT`` to ``LONG`` words."""
    found = []
    for text in texts:
        words = 0
        kept = []
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words += len(sentence.split())
            if words > LONG:
                break
            kept.append(sentence)
        if sum(len(sentence.split()) for sentence in kept) >= SHORT:
            found.append(" ".join(kept))
    return found


def names(text: str) -> list[str]:
    """Capitalised words inside its sentences: what one could ask about."""
    return sorted(set(NAME.findall(text)))


class Composer:
    """Makes prompts; each kind is an endless stream of texts, drawn by one generator.

    Args:
        passages: at least three. questions: short prompts, to begin a conversation with.
    """

    def __init__(self, passages: list[str], questions: list[str], draw: random.Random) -> None:
        self.passages, self.questions, self.draw = passages, questions, draw
        self.sentences = [
            sentence
            for passage in passages
            for sentence in re.split(r"(?<=[.!?])\s+", passage)
            if 6 <= len(sentence.split()) <= 30 and sentence[-1] in ".!?"
        ]
        self.names = sorted({name for passage in passages for name in names(passage)})

    def summarization(self) -> tuple[str, ...]:
        return (self.draw.choice(SUMMARIZE).format(text=self.draw.choice(self.passages)),)

    def rag(self) -> tuple[str, ...]:
        """Passages, one of which holds what the question is about."""
        chosen = self.draw.sample(self.passages, self.draw.choice((1, 2, 3)))
        known = [name for passage in chosen for name in names(passage)] or ["the first paragraph"]
        question = self.draw.choice(ASK).format(name=self.draw.choice(known))
        texts = [" ".join(passage.split()[: LONG // len(chosen)]) for passage in chosen]
        return ("\n".join([*texts, question]),)

    def translation(self) -> tuple[str, ...]:
        if self.draw.random() < 0.6:
            return ("Translate German to English: " + german.sentence(self.draw),)
        return (self.draw.choice(TRANSLATE).format(text=self.draw.choice(self.sentences)),)

    def qa(self) -> tuple[str, ...]:
        return (self.draw.choice(QUESTIONS).format(name=self.draw.choice(self.names)),)

    def chat(self) -> tuple[str, ...]:
        return (self.draw.choice(self.questions), self.draw.choice(FOLLOW_UPS))


def compose(composer: Composer, evaluation: list[Prompt], counts: dict[str, int]) -> Iterator[Prompt]:
    """Yield as many prompts of each kind as asked for; none twice, none that overlaps the evaluation.

    Raises:
        PromptError: the texts at hand do not give as many different ones.
    """
    for task, count in counts.items():
        make: Callable[[], tuple[str, ...]] = getattr(composer, task)
        drawn = dict.fromkeys(make() for _ in range(2 * count + 10))
        free = without_overlap((Prompt(f"composed-{task}/{i}", task, turns) for i, turns in enumerate(drawn)), evaluation)
        if len(free) < count:
            raise PromptError(f"--{task}: found {count}, allowed: up to {len(free)}, which is what the texts at hand give")
        yield from free[:count]


KINDS = ("summarization", "rag", "translation", "qa", "chat")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.compose", description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="file of prompts, JSONL; to be named in training.prompts")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=500, metavar="N", help="prompts of this kind (default: 500)")
    args = parser.parse_args(arguments)
    try:
        pipeline = load(args.pipeline)
        files = [Path(file) for file in pipeline.training.prompts]
        prompts = read_prompts(file for file in files if file != args.output)  # once made it is named there too
        evaluation = read_prompts(map(Path, pipeline.training.evaluation_prompts))
        texts = [turn for prompt in prompts if prompt.task != SUMS for turn in prompt.turns]
        corpus = Path(pipeline.training.corpus)
        if corpus.exists():
            folder = checkpoints.open_target(checkpoints.locate(pipeline.target.checkpoint, pipeline.target.revision))
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            said = (answer.response_ids for answer in read_corpus(corpus) if answer.task != SUMS)
            texts += [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]
        long = passages(texts)
        questions = [prompt.turns[0] for prompt in prompts if len(prompt.turns[0].split()) < SHORT]
        if len(long) < 3 or not questions:
            raise PromptError(
                f"{args.pipeline}: training.prompts and training.corpus hold too little text to compose prompts of"
            )
        composer = Composer(long, questions, random.Random(pipeline.training.seed))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("w", encoding="utf-8") as lines:
            for prompt in compose(composer, evaluation, {kind: getattr(args, kind) for kind in KINDS}):
                lines.write(json.dumps(asdict(prompt), ensure_ascii=False) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
