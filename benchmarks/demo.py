"""The demo: build the pipeline, serve it, stream two answers, and set ``auto`` beside plain decoding on the same engines."""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from client import Client, Message, Options, ServiceError
from engines.build_directory import BuildDirectoryError
from triton_repo.serve import Ports, ServeError, Server

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Explain in three sentences why the sky is blue."
ANOTHER = "Write a Python function that returns the largest of three numbers."
TOKENS = 64  # of each timed answer
MODES = ("autoregressive", "auto")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder of the build (default: build/)")
    args = parser.parse_args()
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "export" / "build.py"), str(args.pipeline), "--output", str(args.output)]
    if status := subprocess.run(command, check=False).returncode:
        return status
    log = args.output / "triton.log"
    print(f"\nstarting Triton (its log: {log}) …", flush=True)
    try:
        with Server(args.output, "127.0.0.1", Ports(0, 0, 0), log) as server:
            server.wait_until_ready()
            print(
                f"ready {time.monotonic() - began:.0f} s after the start, on HTTP {server.ports.http}, gRPC {server.ports.grpc}"
            )
            show(Client(f"127.0.0.1:{server.ports.grpc}"), "gRPC", QUESTION)
            show(Client(f"127.0.0.1:{server.ports.http}", "http"), "HTTP", ANOTHER)
            compare(Client(f"127.0.0.1:{server.ports.grpc}"))
            choices(server.ports.metrics)
    except (BuildDirectoryError, ServeError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("Triton stopped")
    return 0


def chat(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def show(client: Client, protocol: str, question: str) -> None:
    print(f"\n[{protocol}] {question}\n", flush=True)
    for piece in client.stream(chat(question), Options(max_tokens=128)):
        print(piece.text, end="", flush=True)
    print()


def compare(client: Client) -> None:
    """One prompt of each evaluation task in both modes, in turn, so that a slow moment of the machine hits both. The service
    knows each prompt before either mode is timed: it computes none twice, and whoever came first would pay for both."""
    prompts: dict[str, str] = {}
    for line in (ROOT / "training" / "prompts" / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        prompts.setdefault(prompt["task"], prompt["turns"][0])
    print(f"\n{len(prompts)} prompts, one of each evaluation task, {TOKENS} tokens each, greedy:\n", flush=True)
    tokens, cycles, seconds = (dict.fromkeys(MODES, 0.0) for _ in range(3))
    same = 0
    for number, text in enumerate(prompts.values()):
        answers = []
        client.generate(chat(text), Options(max_tokens=1))
        for mode in MODES if number % 2 else MODES[::-1]:
            start = time.monotonic()
            answer = client.generate(chat(text), Options(max_tokens=TOKENS, mode=mode))
            seconds[mode] += time.monotonic() - start
            tokens[mode] += answer.output_tokens
            cycles[mode] += answer.cycles
            answers.append(answer.text)
        same += answers[0] == answers[1]
    print(f"{'':16}{'acceptance length':>18}{'tokens/s':>10}")
    for mode in MODES:
        print(f"{mode:16}{tokens[mode] / cycles[mode]:>18.2f}{tokens[mode] / seconds[mode]:>10.1f}")
    ratio = (tokens["auto"] / seconds["auto"]) / (tokens["autoregressive"] / seconds["autoregressive"])
    print(f"\nauto is {ratio:.2f} times as fast here; {same} of {len(prompts)} answers are the same to the letter")


def choices(port: int) -> None:
    """What the planner chose, by the service's own count."""
    time.sleep(1.5)  # numbers are told once a second
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    found = re.findall(r'^d2sd:planned_cycles_total\{.*choice="([^"]+)".*\} (\S+)$', metrics, re.MULTILINE)
    chosen = ", ".join(f"{what} {float(count):.0f}" for what, count in sorted(found, key=lambda f: -float(f[1])))
    print(f"what auto chose, by cycles: {chosen}")


if __name__ == "__main__":
    sys.exit(main())
