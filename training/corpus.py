"""``python -m training.corpus pipeline.yaml``: prompts answered by the target itself, for drafters to learn from.

Drafters learn the target's words, not those of a data set. The prompts are those of the files that ``training.prompts``
names, or as many as are asked for that the target invents: it writes the user's message, then answers it.
The corpus grows answer by answer; run again, the command goes on where it was.
"""

import argparse
import json
import lzma
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from decoding.cycle import Decoder
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence as Decoding
from engines.build_directory import BuildDirectory
from engines.dense import Target
from export.build import build
from export.config import UserError, load
from export.prompts import Prompt, PromptError, chat_ids, read_prompts
from training.prompts import OPENINGS, opening_ids, without_overlap

SLOTS = 16  # prompts answered together
PACKED = ".xz"  # suffix of a corpus that is read and does not grow
WARM = 0.8  # temperature of every third answer; the others are greedy
INVENTED_TOKENS = 200  # of an invented prompt, at most


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
    """Read a corpus (JSONL, packed or not). A last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is not an answer, or what is packed cannot be unpacked.
    """
    try:
        return list(_read(path))
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: cannot be unpacked ({error})") from None


def _read(path: Path) -> Iterator[Answer]:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == PACKED else path.open(encoding="utf-8") as lines:
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


class Answerer:
    """The compiled target, alone, answering many prompts at once.

    Args:
        target: its engine. directory: the build that it comes from.
    """

    def __init__(self, target: Target, directory: BuildDirectory, slots: int = SLOTS) -> None:
        self.limit = int(directory.manifest["limits"]["length"])
        self.end_ids = frozenset(directory.manifest["end_ids"])
        decoder = Decoder(target, None, None, mode="autoregressive", block_size=2, branches=1, vocabulary=directory.vocabulary)
        self.scheduler = Scheduler(decoder, slots)
        # Not AutoTokenizer: a class that is declared may replace parts of tokenizer.json, whose ids are the target's.
        load = PreTrainedTokenizerFast.from_pretrained
        self.tokenizer: PreTrainedTokenizerBase = load(directory.tokenizer, local_files_only=True)

    def answer(self, asked: Iterable[Answer], tokens: int) -> Iterator[Answer]:
        """Answer prompts: each comes as an ``Answer`` without response, and leaves in the order in which it is done.

        Args:
            tokens: of an answer, at most. Prompts that leave no room within the pipeline's limit are dropped.
        """
        open_answers: dict[Decoding, Answer] = {}
        for answer in asked:
            room = self.limit - len(answer.prompt_ids)
            if room < 2:
                continue
            sampling = Sampling(answer.temperature, seed=random.Random(answer.id).getrandbits(32))
            sequence = Decoding(answer.prompt_ids, min(tokens, room), sampling, self.end_ids)
            open_answers[sequence] = answer
            self.scheduler.add(sequence)
            if len(open_answers) > 2 * self.scheduler.slots:
                yield from self._step(open_answers)
        while open_answers:
            yield from self._step(open_answers)

    def _step(self, open_answers: dict[Decoding, Answer]) -> Iterator[Answer]:
        for sequence, _ in self.scheduler.step():
            if sequence.finish:
                asked = open_answers.pop(sequence)
                yield Answer(asked.id, asked.task, asked.prompt_ids, sequence.answer, asked.temperature)


def invent(path: Path, answerer: Answerer, count: int, seed: int) -> list[Prompt]:
    """Let the target write ``count`` prompts from the user's side of its chat template, and keep the usable ones in a file.

    What is too short, breaks off, or was written before is dropped. What the file holds already is not written again.
    """
    _drop_cut_line(path)
    prompts = read_prompts([path]) if path.exists() else []
    seen = {prompt.turns[0] for prompt in prompts}
    start = max((int(prompt.id.rpartition("/")[2]) + 1 for prompt in prompts), default=0)
    tasks = sorted(OPENINGS)
    openings: dict[str, str] = {}

    def asked() -> Iterator[Answer]:
        for number in range(start, count):
            task = tasks[number % len(tasks)]
            name = f"invented-{seed}/{number}"
            openings[name] = random.Random(name).choice(OPENINGS[task])
            yield Answer(name, task, opening_ids(answerer.tokenizer, openings[name]), [], 1.0)

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        for written in answerer.answer(asked(), INVENTED_TOKENS):
            written_on = str(answerer.tokenizer.decode(written.response_ids[:-1]))
            text = (openings[written.id] + written_on).strip()
            if written.response_ids[-1] in answerer.end_ids and len(text.split()) >= 3 and text not in seen:
                seen.add(text)
                prompts.append(Prompt(written.id, written.task, (text,)))
                lines.write(json.dumps(asdict(prompts[-1]), ensure_ascii=False) + "\n")
                lines.flush()
                if len(prompts) % 50 == 0:
                    print(f"{len(prompts)} prompts invented", flush=True)
    return prompts


def extend(path: Path, answerer: Answerer, prompts: Sequence[Prompt], tokens: int) -> None:
    """Answer the prompts that a corpus does not hold yet and append them to it, with progress.

    A conversation's later turns are asked behind its earlier ones, the target's own answers between them. What a kill can
    take of the file is the answer that was being written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(path)
    done = {answer.id: answer for answer in _read(path)} if path.exists() else {}
    missing = sum(turn_id(prompt, turn) not in done for prompt in prompts for turn in range(len(prompt.turns)))
    print(f"{len(done)} answers in {path}, {missing} to come", flush=True)
    began, count, words = time.monotonic(), 0, 0
    with path.open("a", encoding="utf-8") as lines:
        for turn in range(max((len(prompt.turns) for prompt in prompts), default=0)):
            for answer in answerer.answer(_asked(prompts, turn, done, answerer.tokenizer), tokens):
                done[answer.id] = answer
                lines.write(json.dumps(asdict(answer), separators=(",", ":")) + "\n")
                lines.flush()
                count, words = count + 1, words + len(answer.response_ids)
                if count % 50 == 0 or count == missing:
                    pace = words / (time.monotonic() - began)
                    print(f"{count}/{missing} answers, {words} tokens, {pace:.0f} tokens/s", flush=True)


def turn_id(prompt: Prompt, turn: int) -> str:
    """Name of the answer to a turn of a prompt: the first turn's is the prompt's own."""
    return f"{prompt.id}#{turn}" if turn else prompt.id


def _asked(
    prompts: Sequence[Prompt], turn: int, done: dict[str, Answer], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Answer]:
    """What is still to be answered of a turn, where the turns before it are."""
    for prompt in prompts:
        earlier = [done.get(turn_id(prompt, before)) for before in range(turn)]
        name = turn_id(prompt, turn) if turn < len(prompt.turns) else None
        if name is None or name in done or None in earlier:
            continue
        history: list[str] = []
        for text, said in zip(prompt.turns, earlier, strict=False):
            assert said is not None
            history += [text, str(tokenizer.decode(said.response_ids, skip_special_tokens=True))]
        yield Answer(name, prompt.task, chat_ids(tokenizer, [*history, prompt.turns[turn]]), [], temperature_of(name))


def temperature_of(prompt_id: str) -> float:
    """Every third answer is sampled: drafters then meet prefixes that greedy decoding never takes."""
    return WARM if random.Random(f"temperature {prompt_id}").random() < 1 / 3 else 0.0


def _drop_cut_line(path: Path) -> None:
    """Remove a last line that a kill cut short, so that the next one does not grow onto it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--output", type=Path, help="the corpus (default: training.corpus of the pipeline)")
    parser.add_argument("--invent", type=int, default=0, metavar="N", help="let the target invent N prompts besides")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer, at most (default: 512)")
    parser.add_argument("--slots", type=int, default=SLOTS, help=f"prompts answered together (default: {SLOTS})")
    parser.add_argument("--build", type=Path, default=Path("build/training"), help="where the target is compiled")
    args = parser.parse_args(arguments)
    try:
        pipeline = load(args.pipeline)
        options = pipeline.training
        prompts = read_prompts(map(Path, options.prompts))
        evaluation = read_prompts(map(Path, options.evaluation_prompts))
        corpus = args.output or Path(options.corpus)
        if corpus.suffix == PACKED:
            raise PromptError(f"{corpus}: found a packed corpus, allowed: a file that can grow; name one by --output")
        if not prompts and not args.invent:
            raise PromptError(
                f"{args.pipeline}: training.prompts names no file; name some, or let the target --invent N prompts"
            )
        build(pipeline.without_drafters(), args.build)
        directory = BuildDirectory.open(args.build)
        answerer = Answerer(directory.load()[0], directory, args.slots)
        if args.invent:
            prompts += invent(corpus.with_suffix(".invented.jsonl"), answerer, args.invent, options.seed)
        extend(corpus, answerer, without_overlap(prompts, evaluation), args.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
