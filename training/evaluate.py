"""``python -m training.evaluate pipeline.yaml``: acceptance length by task and decoding mode, and what stands behind it.

Greedy. The target answers each prompt once, and every mode is measured on those answers (``replay.py``). Acceptance length
is committed tokens per target pass. A mode's mean gives every task the same weight; its interval is a bootstrap over prompts.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence as Many
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decoding import ngrams
from decoding.cycle import Decoder
from decoding.modes import MODES, ModeName, Redraft
from decoding.ngrams import NGrams
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.build_directory import BuildDirectory
from engines.dense import Drafter
from export import checkpoints
from export.build import build
from export.config import Pipeline, UserError, load
from export.prompts import Prompt, chat_ids, first_of_each_task, read_prompts
from training import report
from training.corpus import Answer, Answerer, read_corpus
from training.features import Features
from training.replay import ROWS, HostDrafter, Record, RecordingDrafter, ReplayTarget

SLOTS = 8  # answers decoded together
MEASURED = tuple(name for name, mode in MODES.items() if name != "autoregressive" and not mode.planned)
TREES = ("lookup", "ngrams", "free", "ddtree", "first_text", "first_second", "pooled", "all")
DEFAULT_MODES = (
    *(f"{mode}@{rows}" for mode in TREES for rows in (8, 12, 16, 32)),
    "dflash",
    "runner_up",
    "naive_samples",
    "random_redraft",
    "fixed_redraft",
    "uniform_prefixes",
    "dflash_twice:free",
    "dflash_twice",
    "d2sd:free",
    "d2sd@1",
    "d2sd@2",
    "d2sd@3",
    "d2sd",
)


class EvaluationError(UserError):
    """The evaluation cannot be run; the message says why."""


def answers_of(prompts: Many[Prompt], directory: BuildDirectory, tokens: int, path: Path) -> list[Answer]:
    """The target's greedy answers to every turn of every prompt, kept in a file for the next evaluation."""
    known = {answer.id: answer for answer in read_corpus(path)} if path.exists() else {}
    names = [[f"{prompt.id}#{turn}" for turn in range(len(prompt.turns))] for prompt in prompts]
    missing = [p for p, turns in zip(prompts, names, strict=True) if not all(name in known for name in turns)]
    if missing:
        print(f"the target answers {len(missing)} prompts, once for all evaluations", flush=True)
        answerer = Answerer(directory.load()[0], directory, SLOTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        began, words = time.monotonic(), 0
        with path.open("a", encoding="utf-8") as lines:
            for turn in range(max(len(prompt.turns) for prompt in missing)):
                asked = [
                    Answer(f"{p.id}#{turn}", p.task, chat_ids(answerer.tokenizer, _history(p, turn, known, answerer)), [], 0.0)
                    for p in missing
                    if turn < len(p.turns) and f"{p.id}#{turn}" not in known
                ]
                for answer in answerer.answer(asked, tokens):
                    known[answer.id] = answer
                    lines.write(json.dumps(asdict(answer), separators=(",", ":")) + "\n")
                    words += len(answer.response_ids)
                    if len(known) % 20 == 0:
                        print(f"{len(known)} answers, {words / (time.monotonic() - began):.0f} tokens/s", flush=True)
    return [known[name] for turns in names for name in turns if name in known and len(known[name].response_ids) > 1]


def _history(prompt: Prompt, turn: int, known: dict[str, Answer], answerer: Answerer) -> list[str]:
    """The conversation up to a turn, the target's own answers in it."""
    history = []
    for earlier in range(turn):
        said = known[f"{prompt.id}#{earlier}"].response_ids
        history += [prompt.turns[earlier], str(answerer.tokenizer.decode(said, skip_special_tokens=True))]
    return [*history, prompt.turns[turn]]


def parse_mode(text: str) -> tuple[ModeName, Redraft, int | None]:
    """Read ``MODE[:free][@N]``: a decoding mode, its redraft, and how many rows its best-first tree has, or else how many
    branches it adds, if not as usual.

    Raises:
        EvaluationError: it is not of this form.
    """
    found = re.fullmatch(r"(\w+)(:free)?(?:@([1-9]\d?))?", text)
    size = int(found[3]) if found and found[3] else None
    if found is None or found[1] not in MEASURED or (found[2] and MODES[found[1]].sources):
        raise EvaluationError(
            f"--modes: found {text}, allowed: {', '.join(MEASURED)}; behind it :free and @K, or @ROWS of a tree"
        )
    if size and size > 16 and not MODES[found[1]].sources:
        raise EvaluationError(f"--modes: found {text}, allowed: up to @16")
    return found[1], "free" if found[2] else "exclusive", size


def measure(
    mode: str,
    answers: Many[Answer],
    features: Features,
    drafters: tuple[Drafter, Drafter],
    options: dict[str, Any],
    vocabulary: int,
    table: NGrams | None,
) -> list[Record]:
    """Decode every answer in a mode (``parse_mode``); returns a record each."""
    name, redraft, size = parse_mode(mode)
    target = ReplayTarget()
    first = RecordingDrafter(drafters[0], target, options["block_size"])
    decoder = Decoder(
        target,
        first,
        HostDrafter(drafters[1]),
        mode=name,
        block_size=options["block_size"],
        branches=options["branches"] if size is None or MODES[name].sources else size,
        rows=size or ROWS,
        vocabulary=vocabulary,
        selection=options["selection"],
        redraft=redraft,
        ngrams=table,
    )
    scheduler = Scheduler(decoder, SLOTS)
    began, shown = time.monotonic(), time.monotonic()
    # Answers of like length together; a few at a time, for the sake of their features' memory.
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    results: dict[int, Record] = {}
    records: dict[Sequence, Record] = {}
    for start in range(0, len(order), 4 * SLOTS):
        for i in order[start : start + 4 * SLOTS]:
            results[i] = Record()
            rows = features.batch([i])[0].float().numpy()
            target.expect(answers[i], rows, results[i])
            sequence = Sequence(answers[i].prompt_ids, len(answers[i].response_ids))
            records[sequence] = results[i]
            scheduler.add(sequence)
        while scheduler:
            if scheduler.step():
                for walk in decoder.walks:
                    records[walk.sequence].add(walk)
            if time.monotonic() - shown > 20:
                shown = time.monotonic()
                print(f"  {mode}: {len(results)}/{len(answers)} answers, {shown - began:.0f} s", flush=True)
    return [results[i] for i in range(len(answers))]


def run(pipeline: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate; returns what ``--json`` writes."""
    for mode in args.modes:
        parse_mode(mode)
    build(pipeline, args.build)
    directory = BuildDirectory.open(args.build)
    options = directory.manifest["decoding"]
    prompts = read_prompts([args.prompts])
    if args.limit:
        prompts = first_of_each_task(prompts, args.limit)
    key = directory.manifest["graphs"]["target"]["key"][:16]
    answers = answers_of(prompts, directory, args.tokens, args.build / "evaluation" / f"{key}-{args.tokens}.jsonl")
    target, first, second = directory.load()
    assert first is not None
    assert second is not None
    vocabulary, table = directory.vocabulary, ngrams.load(directory.ngrams)
    del target
    folder = checkpoints.open_target(checkpoints.locate(pipeline.target.checkpoint, pipeline.target.revision))
    assert pipeline.drafters is not None
    layer_ids = checkpoints.read_drafter(checkpoints.locate(pipeline.drafters.first)).target_layer_ids
    cache = args.build / "evaluation" / f"features-{key}-{args.tokens}-{len(answers)}"
    features = Features(answers, checkpoints.load_target(folder), layer_ids, cache)
    records = {}
    for mode in args.modes:
        records[mode] = measure(mode, answers, features, (first, second), options, vocabulary, table)
        summary = report.acceptance(answers, records[mode])
        print(f"{mode:20} {summary['mean']:.3f}  [{summary['low']:.3f}, {summary['high']:.3f}]", flush=True)
    return report.summarise(answers, records, options, args.tokens)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("training/prompts/eval.jsonl"), help="JSONL file of prompts")
    parser.add_argument("--limit", type=int, help="prompts of each task, at most")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most (default: 128)")
    parser.add_argument(
        "--modes", nargs="+", default=list(DEFAULT_MODES), metavar="MODE", help="MODE, MODE:free, MODE@K, TREE@ROWS"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="write tables and plots")
    parser.add_argument("--build", type=Path, default=Path("build"), help="build directory (default: build/)")
    args = parser.parse_args(arguments)
    try:
        figures = run(load(args.pipeline), args)
        print("\n" + report.table(figures))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        if args.docs:
            report.write_docs(figures, args.docs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
