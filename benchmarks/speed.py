"""``python -m benchmarks.speed build/``: how fast each mode decodes, and what others make of the same model, in one run.

Every figure is a ratio to plain decoding of the same prompts at the same time: a mode and plain decoding take turns, a quarter
of a second each, so that a slow moment of the machine hits both. Raw samples go to a JSONL file; what it holds already is not
measured again. Decoding alone is timed, when all prompts are in. Beside peers whole answers are timed, and where eight requests
run together their prompts too. ``--served`` asks a running service instead, whole answers in turn.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from client import Client, Options, ServiceError
from decoding import ngrams
from decoding.cycle import Decoder
from decoding.modes import ModeName
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.build_directory import BuildDirectory, BuildDirectoryError
from engines.costs import machine
from engines.engine import EngineError
from export.prompts import chat_ids, first_of_each_task, read_prompts

PLAIN: ModeName = "autoregressive"
MODES: tuple[ModeName, ...] = ("lookup", "dflash", "ddtree", "d2sd", "auto")
GROUPS = ("task", "temperature", "concurrency", "context")
PROMPTS = Path(__file__).resolve().parent.parent / "training" / "prompts" / "eval.jsonl"
PEERS = Path(__file__).with_name("peers")
SLICE = 0.25  # seconds of a turn
PIECE = 128  # tokens of a prompt that are taken in at once
PACKAGES = {
    "llamacpp": ["xllamacpp"],
    "genai": ["openvino-genai"],
    "transformers": ["torch==2.13.0", "transformers>=5.20,<6", "gguf", "accelerate", "numpy<2"],
}


@dataclass(frozen=True)
class Case:
    """What is measured: requests that run together, again and again.

    Attributes:
        group: the table that it belongs to. name: its row. prompts: of token ids, one for each request.
        tokens: of an answer, at most. ends: whether the target may end it before; else all are of one length.
    """

    group: str
    name: str
    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    temperature: float = 0.0
    ends: bool = False

    @property
    def alone(self) -> bool:
        return len(self.prompts) == 1


class Ours:
    """A build's engines, and a decoder over them."""

    def __init__(self, directory: BuildDirectory) -> None:
        self.directory = directory
        engines = directory.load()
        self.costs = directory.costs(*engines)
        options = directory.manifest["decoding"]
        gc.freeze()  # as the service does
        self.decoder = Decoder(
            *engines,
            mode="auto",
            block_size=options["block_size"],
            branches=options["branches"],
            vocabulary=directory.vocabulary,
            costs=self.costs,
            ngrams=ngrams.load(directory.ngrams),
        )

    def race(self, case: Case, modes: Many[ModeName], seed: int) -> list[dict[str, float]]:
        """Answer a case's prompts in each mode, the modes in turn, as long as all answers go on: so many streams are measured.
        Returns of each: tokens, target passes, and seconds."""
        self.decoder.reset()
        running = [self._sequences(case, mode, seed) for mode in modes]
        for sequence in (s for own in running for s in own):
            self.decoder.open(sequence)
            while missing := sequence.position - sequence.computed:
                self.decoder.cycle([], [(sequence, min(missing, PIECE))])
        made = [{"tokens": 0.0, "passes": 0.0, "seconds": 0.0} for _ in modes]
        while any(running):
            for own, counted in zip(running, made, strict=True):
                began = now = time.perf_counter()
                while own and now < began + SLICE:
                    said = self.decoder.cycle(own)
                    if any(s.finish for s in own):
                        for sequence in own:
                            self.decoder.close(sequence)
                        own.clear()
                    counted["tokens"] += sum(map(len, said))
                    counted["passes"] += 1
                    now = time.perf_counter()
                counted["seconds"] += now - began
        return made

    def serve(self, case: Case, mode: ModeName, seed: int) -> dict[str, float]:
        """Answer a case's prompts as a service would; returns tokens and seconds, from the first token on if there is one
        prompt."""
        self.decoder.reset()  # or whoever comes second would find the prompts computed
        scheduler = Scheduler(self.decoder, len(case.prompts), self.costs)
        sequences = self._sequences(case, mode, seed)
        began = time.perf_counter()
        for sequence in sequences:
            scheduler.add(sequence)
        while case.alone and not sequences[0].answer:
            scheduler.step()
        if case.alone:
            began = time.perf_counter()
        before = sum(len(s.answer) for s in sequences)
        while any(not s.finish for s in sequences):
            scheduler.step()
        done = time.perf_counter()
        scheduler.step()  # the finished leave
        return {"tokens": sum(len(s.answer) for s in sequences) - before, "seconds": done - began}

    def _sequences(self, case: Case, mode: ModeName, seed: int) -> list[Sequence]:
        sampling = [Sampling(case.temperature, seed=seed + i) for i in range(len(case.prompts))]
        ends = frozenset(self.directory.manifest["end_ids"] if case.ends else [])
        return [Sequence(list(p), case.tokens, s, mode=mode, end_ids=ends) for p, s in zip(case.prompts, sampling, strict=True)]


class Served:
    """A served build, asked by its own client.

    Args:
        address: host:port of its gRPC.
    """

    def __init__(self, address: str) -> None:
        self.client = Client(address)

    def race(self, case: Case, modes: Many[ModeName], seed: int) -> list[dict[str, float]]:
        """As ``Ours.race``, each mode's answers whole: what came between the moment in which all of them had begun and that in
        which the first one ended."""
        made = []
        for mode in modes:
            with ThreadPoolExecutor(len(case.prompts)) as streams:
                asked = [
                    streams.submit(
                        self._ask,
                        list(prompt),
                        Options(
                            max_tokens=case.tokens,
                            temperature=case.temperature,
                            seed=seed + i,
                            ignore_eos=not case.ends,
                            mode=mode,
                        ),
                    )
                    for i, prompt in enumerate(case.prompts)
                ]
                seen = [stream.result() for stream in asked]
            begun, ended = max(own[0][0] for own in seen), min(own[-1][0] for own in seen)
            meanwhile = [[each for each in own if begun <= each[0] <= ended] for own in seen]
            tokens, passes = (sum(own[-1][i] - own[0][i] for own in meanwhile if own) for i in (1, 2))
            made.append({"tokens": tokens, "passes": passes, "seconds": max(ended - begun, 0.0)})
        return made

    def _ask(self, prompt: list[int], options: Options) -> list[tuple[float, int, int]]:
        """Of every piece of an answer: when it came, tokens and passes by then."""
        return [(time.perf_counter(), p.output_tokens, p.cycles) for p in self.client.stream(prompt, options)]


class Peer:
    """Another program in an environment of its own, which answers one request at a time over its standard streams."""

    def __init__(self, name: str, build: Path, gguf: Path) -> None:
        self.name = name
        home = build / "peers" / name
        python = home / "bin" / "python"
        if not (home / "ready").exists():
            print(f"{name}: making its environment", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[name]]
            subprocess.run(install, check=True)
            (home / "ready").touch()
        command = [str(python), str(PEERS / f"{name}.py"), str(gguf), str(len(os.sched_getaffinity(0)))]
        log = (build / "peers" / f"{name}.log").open("w")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.modes: list[str] = self._read()["modes"]

    def run(self, texts: Many[str], tokens: int, mode: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": list(texts), "tokens": tokens, "mode": mode}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        """Its next line of JSON; it may say other things in between."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended; its log is beside its environment")

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def cases(tokenizer: PreTrainedTokenizerFast, each: int, tokens: int, longest: int) -> Iterator[Case]:
    """What the tables are about."""
    prompts = first_of_each_task(read_prompts([PROMPTS]), max(each, 16))
    ids = {prompt.id: tuple(chat_ids(tokenizer, prompt.turns[:1])) for prompt in prompts}
    fitting = [prompt for prompt in prompts if len(ids[prompt.id]) + tokens < longest]
    by_task: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for prompt in fitting:
        by_task[prompt.task].append(ids[prompt.id])
    for number in range(each):
        for task, own in by_task.items():
            yield Case("task", task, (own[number % len(own)],), tokens, ends=True)
    for temperature in (0.7, 1.0):
        for own in by_task.values():
            yield Case("temperature", f"T = {temperature:g}", (own[0],), tokens, temperature, ends=True)
    mixed = random.Random(0).sample([p for own in by_task.values() for p in own], 16)
    for together in (2, 4, 8, 16):
        yield Case("concurrency", f"{together} together", tuple(mixed[:together]), tokens)
    text = [token for own in by_task.values() for token in own[0]] * 8
    for length in (128, 1024, 1900):
        if length + tokens < longest:
            yield Case("context", f"{length} tokens", (tuple(text[:length]),), tokens)


def measure(ours: Ours | Served, chosen: Many[Case], modes: Many[ModeName], rounds: int, file: Path) -> list[dict[str, Any]]:
    """Run what the file does not hold yet."""
    read = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    samples = [sample for sample in read if "plain" in sample]  # earlier versions measured plain decoding apart
    known = {(s["round"], s["case"], s["mode"]) for s in samples}
    began = time.monotonic()
    with file.open("a", encoding="utf-8") as lines:
        for turn in range(rounds):
            for number, case in enumerate(chosen):
                order = list(modes)
                random.Random(f"{turn}/{number}").shuffle(order)
                for mode in order:
                    if (turn, number, mode) in known:
                        continue
                    pair = [mode, PLAIN] if (turn + number) % 2 else [PLAIN, mode]
                    made = dict(zip(pair, ours.race(case, pair, seed=1000 * number), strict=True))
                    sample = {"round": turn, "case": number, "group": case.group, "name": case.name, "mode": mode}
                    samples.append(sample | made[mode] | {"plain": made[PLAIN]})
                    lines.write(json.dumps(samples[-1]) + "\n")
                    lines.flush()
                if sys.stderr.isatty() or number % 8 == 7:
                    took = time.monotonic() - began
                    print(f"round {turn + 1}/{rounds}, case {number + 1}/{len(chosen)}, {took:.0f} s", flush=True)
    return samples


def ratios(samples: Many[dict[str, Any]], group: str) -> dict[str, dict[str, list[float]]]:
    """Speed over plain decoding: of each row and mode, a figure a round (tokens of all its cases by their seconds)."""
    sums: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0] * 4)
    for sample in samples:
        if sample["group"] == group:
            plain = sample["plain"]
            own = sample["tokens"], sample["seconds"], plain["tokens"], plain["seconds"]
            entry = sums[sample["name"], sample["mode"], sample["round"]]
            entry[:] = [a + b for a, b in zip(entry, own, strict=True)]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (name, mode, _), (tokens, seconds, plain_tokens, plain_seconds) in sums.items():
        found[name][mode].append(tokens / seconds / (plain_tokens / plain_seconds))
    return found


def table(samples: Many[dict[str, Any]], group: str, modes: Many[str]) -> str:
    """Medians over rounds with the lowest and highest, as Markdown; the last row is the rows' mean."""
    found = ratios(samples, group)
    lines = ["| " + " | ".join([group, *modes]) + " |", "|---" * (len(modes) + 1) + "|"]
    medians: dict[str, list[float]] = defaultdict(list)
    for name, by_mode in found.items():
        cells = []
        for mode in modes:
            values = by_mode[mode]
            medians[mode].append(statistics.median(values))
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines.append("| " + " | ".join(["**mean**", *(f"**{statistics.mean(medians[mode]):.2f}**" for mode in modes)]) + " |")
    return "\n".join(lines)


def beside(ours: Ours, peers: Many[Peer], tokenizer: PreTrainedTokenizerFast, chosen: Many[Case], rounds: int) -> str:
    """Ours and the peers', in turn, on the same prompts: tokens/s of decoding for one, of everything for eight together."""
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    # Peers are told to go on behind an answer's end, so that all make as many tokens.
    alone = [replace(case, ends=False) for case in chosen if case.group == "task"][:8]
    eight = [case for case in chosen if case.name == "8 together"]
    for turn in range(rounds):
        for case in (*alone, *eight):
            column = "1 stream, decoding" if case.alone else "8 streams, with prompts"
            own: tuple[ModeName, ...] = (PLAIN, "auto")
            for mode in own:
                made = ours.serve(case, mode, seed=turn)
                rates[f"ours, {mode}"][column].append(made["tokens"] / made["seconds"])
            texts = [str(tokenizer.decode(list(prompt))) for prompt in case.prompts]
            for peer in peers:
                for theirs in peer.modes:
                    made = peer.run(texts, case.tokens, theirs)
                    rates[f"{peer.name}, {theirs}"][column].append(made["tokens"] / made["seconds"])
    columns = ["1 stream, decoding", "8 streams, with prompts"]
    lines = ["| tokens/s, median | " + " | ".join(columns) + " |", "|---|---|---|"]
    for name, by_column in rates.items():
        cells = [f"{statistics.median(by_column[c]):.1f}" if by_column[c] else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(samples: Many[dict[str, Any]], groups: Many[str], modes: Many[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 4.5), layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        found = ratios(samples, group)
        places = np.arange(len(found))
        for i, mode in enumerate(modes):
            heights = [statistics.median(found[name][mode]) for name in found]
            axis.bar(places + (i - len(modes) / 2) * 0.8 / len(modes), heights, 0.8 / len(modes), label=mode)
        axis.axhline(1, color="0.4", linewidth=1)
        axis.set_xticks(places, list(found), rotation=40, ha="right")
        axis.set(title=f"by {group}", ylabel="speed over plain decoding")
    axes[0][0].legend()
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path, help="a build directory")
    parser.add_argument("--quick", action="store_true", help="plain and auto alone, short answers: under 3 minutes")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each task (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often all is measured (default: 3)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), metavar="MODE", help="each beside plain decoding")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="tables that are made (default: all)")
    parser.add_argument("--served", metavar="HOST:PORT", help="ask the build's service there, by gRPC, instead of its engines")
    parser.add_argument("--peers", nargs="*", choices=list(PACKAGES), default=[], help="set these beside it")
    parser.add_argument("--gguf", type=Path, help="the file that peers read (default: the demo's)")
    parser.add_argument("--samples", type=Path, help="JSONL file of raw samples (default: BUILD/speed.jsonl)")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="write speed-tables.md and speed.png")
    args = parser.parse_args(arguments)
    modes: list[Any] = [mode for mode in args.modes if mode != PLAIN]
    if args.quick:
        modes, args.limit, args.tokens, args.rounds = ["auto"], 1, 32, 1
    if args.served and args.peers:
        parser.error("--peers: found with --served, allowed: beside the engines themselves")
    try:
        directory = BuildDirectory.open(args.build)
        ours = None if args.served else Ours(directory)
    except (BuildDirectoryError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory.tokenizer, local_files_only=True)
    every = cases(tokenizer, args.limit, args.tokens, directory.manifest["limits"]["length"])
    chosen = [case for case in every if case.group in args.groups]
    kinds = [kind for kind in ("served", "quick") if getattr(args, kind)]
    file = args.samples or args.build / f"{'-'.join(['speed', *kinds])}.jsonl"
    try:
        samples = measure(ours or Served(args.served), chosen, modes, args.rounds, file)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    engine = directory.manifest["engine"]
    runtime = ours.decoder.target.runtime if ours else f"served at {args.served}"  # type: ignore[attr-defined]
    text = f"{machine()}; {runtime}; weights {engine['weights']}\n\n"
    text += "\n\n".join(table(samples, group, modes) for group in args.groups)
    planner = ours.decoder.planner if ours else None
    if planner is not None and planner.came:
        chose = ", ".join(f"{what} {count}" for what, count in planner.chosen.most_common())
        text += f"\n\nWhat auto chose, by cycles: {chose}. Tokens expected over tokens that came: "
        text += f"{planner.expected / planner.came:.3f}. Seconds of a cycle, beside those predicted: "
        text += f"{statistics.median(abs(ratio - 1) for ratio in planner.off):.1%} off at the median."
    if ours and args.peers:
        from export.checkpoints import locate
        from export.config import load

        gguf = args.gguf or locate(load(PROMPTS.parents[2] / "pipeline.yaml").target.checkpoint)
        peers = [Peer(name, args.build, gguf) for name in args.peers]
        try:
            text += "\n\n" + beside(ours, peers, tokenizer, chosen, args.rounds)
        finally:
            for peer in peers:
                peer.close()
    print(text)
    if args.docs:
        args.docs.mkdir(parents=True, exist_ok=True)
        plot(samples, args.groups, modes, args.docs / "speed.png")
        (args.docs / "speed-tables.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
