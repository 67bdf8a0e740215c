"""Where the time of a cycle at batch 1 goes: in the engines, and outside them."""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from decoding import acceptance, boundary, prefix_tree
from decoding.cycle import Decoder
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.build_directory import BuildDirectory
from engines.dense import Drafter
from training.prompts import chat_ids, first_of_each_task, read_prompts

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """Seconds by name; a span inside another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.seconds[name] += spent - self._inner.pop()
                self._inner[-1] += spent

        return call

    def paused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, what happens in it not counted."""

        def call(*args: Any) -> Any:
            before = dict(self.seconds)
            result = function(*args)
            self.seconds = defaultdict(float, before)
            return result

        return call

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, nargs="?", default=Path("build"), help="a build directory (default: build/)")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each evaluation task (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    directory = BuildDirectory.open(args.build)
    target, first, second = directory.load()
    assert isinstance(first, Drafter)
    assert isinstance(second, Drafter)
    options = directory.manifest["decoding"]
    decoder = Decoder(
        target,
        first,
        second,
        block_size=options["block_size"],
        branches=options["branches"],
        vocabulary=target.engine.info.vocabulary,
        selection=options["selection"],
        redraft=options["redraft"],
    )
    scheduler = Scheduler(decoder, 1, "d2sd")
    tokenizer = AutoTokenizer.from_pretrained(directory.tokenizer, local_files_only=True)
    chosen = first_of_each_task(read_prompts([ROOT / "training" / "prompts" / "eval.jsonl"]), args.limit)
    prompts = [chat_ids(tokenizer, prompt.turns[:1]) for prompt in chosen]

    def answer(prompt: list[int], tokens: int) -> int:
        sequence = Sequence(prompt, tokens, end_ids=frozenset(directory.manifest["end_ids"]))
        scheduler.add(sequence)
        while scheduler:
            scheduler.step()
        return sequence.cycles

    for prompt in prompts:  # meet every shape first
        answer(prompt, 8)
    clock = Clock()
    for model, name in ((target, "target"), (first, "first drafter"), (second, "second drafter")):
        clock.watch(model.engine.session, "run_with_iobinding", f"engine: {name}")  # type: ignore[attr-defined]
        clock.watch(model.engine, "call", "inputs")
        clock.watch(model.engine, "keep", "cache write")
        clock.watch(model, "forward", "padding")
    clock.watch(boundary, "likeliest", "boundary estimate")
    clock.watch(decoder, "redrafts", "branches")
    clock.watch(prefix_tree, "merge", "prefix-tree merge")
    clock.watch(acceptance, "walk", "acceptance walk")
    clock.watch(decoder, "cycle", "the rest")
    decoder.join = clock.paused(decoder.join)  # type: ignore[method-assign]
    cycles = sum(answer(prompt, args.tokens) for prompt in prompts)
    total = sum(clock.seconds.values())
    outside = sum(seconds for name, seconds in clock.seconds.items() if not name.startswith("engine")) / total
    print(f"{cycles} cycles of d2sd at batch 1, {1000 * total / cycles:.1f} ms each\n")
    print("| where | ms a cycle | share |\n|---|---|---|")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1000 * seconds / cycles:.2f} | {seconds / total:.1%} |")
    print(f"\noutside the engines: {outside:.1%}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"cycles": cycles, "seconds": clock.seconds, "outside": outside}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
