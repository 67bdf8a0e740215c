"""Which γ and K are fastest on this machine: every setting answers the same prompts, in turn, at batch 1."""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from decoding.cycle import Decoder
from decoding.modes import ModeName
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.build_directory import BuildDirectory
from training.prompts import chat_ids, first_of_each_task, read_prompts

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Setting:
    """A mode at a γ and a K, what it has answered so far and in what time."""

    mode: ModeName
    gamma: int
    branches: int
    scheduler: Scheduler
    tokens: int = 0
    cycles: int = 0
    seconds: float = 0.0
    same: int = 0  # answers, to the letter, of plain decoding's

    def answer(self, prompt: list[int], tokens: int, ends: frozenset[int]) -> tuple[list[int], float]:
        """The answer and the seconds that its cycles took; the prompt's prefill, alike in all settings, is left out."""
        sequence = Sequence(prompt, tokens, end_ids=ends)
        self.scheduler.add(sequence)
        self.scheduler.step()
        first, began = (len(sequence.answer), sequence.cycles), time.perf_counter()
        while self.scheduler:
            self.scheduler.step()
        seconds = time.perf_counter() - began
        self.tokens += len(sequence.answer) - first[0]
        self.cycles += sequence.cycles - first[1]
        self.seconds += seconds
        return sequence.answer, (len(sequence.answer) - first[0]) / seconds if seconds else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, nargs="?", default=Path("build"), help="a build directory (default: build/)")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each evaluation task (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--gamma", type=int, nargs="+", default=[4, 6, 8], help="block sizes (default: 4 6 8)")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 2, 3, 4], help="K (default: 1 2 3 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    directory = BuildDirectory.open(args.build)
    target, first, second = directory.load()
    options = directory.manifest["decoding"]
    trained = options["block_size"]
    if wrong := [gamma for gamma in args.gamma if not 2 <= gamma <= trained]:
        parser.error(f"--gamma: found {wrong[0]}, allowed: 2 to {trained}, what the drafters of this build draft")

    def setting(mode: ModeName, gamma: int, branches: int) -> Setting:
        decoder = Decoder(
            target,
            first,
            second,
            block_size=gamma,
            branches=branches,
            vocabulary=target.engine.info.vocabulary,
            selection=options["selection"],
            redraft=options["redraft"],
        )
        return Setting(mode, gamma, branches, Scheduler(decoder, 1, mode))

    settings = [setting("autoregressive", 1, 0)]
    for gamma in args.gamma:
        settings.append(setting("dflash", gamma, 0))
        settings += [setting(mode, gamma, k) for mode in ("runner_up", "d2sd") for k in args.branches if k < gamma]
    tokenizer = AutoTokenizer.from_pretrained(directory.tokenizer, local_files_only=True)
    chosen = first_of_each_task(read_prompts([ROOT / "training" / "prompts" / "eval.jsonl"]), args.limit)
    prompts = [chat_ids(tokenizer, prompt.turns[:1]) for prompt in chosen]
    ends = frozenset(directory.manifest["end_ids"])
    for entry in settings:  # meet every shape first
        entry.answer(prompts[0], 16, ends)
        entry.tokens, entry.cycles, entry.seconds = 0, 0, 0.0
    speeds: list[list[float]] = [[] for _ in settings]  # of every prompt, over plain decoding's
    for number, prompt in enumerate(prompts, 1):
        answers, rates = zip(*(entry.answer(prompt, args.tokens, ends) for entry in settings), strict=True)
        differing = sum(answer != answers[0] for answer in answers)
        for entry, answer in zip(settings, answers, strict=True):
            entry.same += answer == answers[0]
        print(f"{number}/{len(prompts)} prompts" + (f", {differing} settings differ: a tie" if differing else ""), flush=True)
        for speed, rate in zip(speeds, rates, strict=True):
            if rates[0]:
                speed.append(rate / rates[0])
    plain = settings[0].tokens / settings[0].seconds
    rows: list[dict[str, Any]] = [
        {
            "mode": entry.mode,
            "gamma": entry.gamma,
            "branches": entry.branches,
            "acceptance_length": entry.tokens / entry.cycles,
            "cycle_over_plain": entry.seconds / entry.cycles * plain,
            "speedup": entry.tokens / entry.seconds / plain,
            "median_speedup": median(speed),
            "same_answers": entry.same,
        }
        for entry, speed in zip(settings, speeds, strict=True)
    ]
    print("\n| mode | γ | K | acceptance length | a cycle, in plain steps | speed over plain decoding | median over prompts |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| {mode} | {gamma} | {branches} | {acceptance_length:.2f} | {cycle_over_plain:.2f} |".format(**row), end="")
        print(" {speedup:.2f} | {median_speedup:.2f} |".format(**row))
    if args.json:
        runtime = target.engine.runtime
        figures = {"processor": platform.machine(), "runtime": runtime, "prompts": len(prompts), "settings": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
