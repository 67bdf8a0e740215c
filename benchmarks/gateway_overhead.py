"""``python -m benchmarks.gateway_overhead``: what the gateway costs beside asking Triton itself, in one interleaved run.

Both sides ask the same of the same running service, by turns. So many streams begin at random instants, the same on both
sides, and each asks one question after another: greedy, prompts of eval.jsonl, which the first round makes known to the prefix
cache. The gateway is asked over connections that stay open, by a client that reads lines and no more: it shares the machine's
cores and is not what is measured. Then one question at a time, where nothing else hides what a first token has to pass.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from client import AsyncClient, Message, Options

ROOT = Path(__file__).resolve().parent.parent
SPREAD = 2.0  # seconds within which streams begin
Timed = tuple[float, int]  # seconds to the first token, tokens
Ask = Callable[[list[Message]], Awaitable[Timed]]


@dataclass
class Measured:
    """Of a side, by round: tokens a second, seconds to the first tokens, seconds of a core a token, here and in the gateway."""

    rates: list[float] = field(default_factory=list)
    firsts: list[list[float]] = field(default_factory=list)
    here: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


class Gateway:
    """One open connection."""

    def __init__(self, url: str, model: str, tokens: int) -> None:
        self.url, self.model, self.tokens = urlsplit(url), model, tokens
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, chat: list[Message]) -> Timed:
        began, first, used = time.monotonic(), 0.0, 0
        asked = {"model": self.model, "messages": chat, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
        body = json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        host = f"{self.url.hostname}:{self.url.port}"
        head = f"POST {self.url.path}/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._streams = self._streams or await asyncio.open_connection(self.url.hostname, self.url.port)
        reader, writer = self._streams
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if not (status := await reader.readline()).startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"{self.url.geturl()}: {status.decode()}{(await reader.read(1000)).decode()}")
        while (line := await reader.readline()) not in (b"0\r\n", b""):  # a chunk of no bytes is the last
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - began
                if b'"usage":{' in line:
                    used = json.loads(line[6:])["usage"]["completion_tokens"]
        await reader.readline()
        return first, used

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()


async def over_grpc(service: AsyncClient, tokens: int, chat: list[Message]) -> Timed:
    began, first, used = time.monotonic(), 0.0, 0
    async for piece in service.stream(chat, Options(max_tokens=tokens, ignore_eos=True)):
        first, used = first or time.monotonic() - began, piece.output_tokens
    return first, used


def spent(url: str) -> float:
    """Seconds of a core that the gateway has used so far, by its own metrics."""
    with urllib.request.urlopen(urlsplit(url)._replace(path="/metrics").geturl()) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("process_cpu_seconds_total ")))


async def round_of(asks: Sequence[Ask], chats: Sequence[list[list[Message]]], url: str, measured: Measured) -> None:
    """Let every stream ask its chats, one after the other."""
    instants = random.Random(0)

    async def stream(ask: Ask, own: list[list[Message]], begin: float) -> list[Timed]:
        await asyncio.sleep(begin)
        return [await ask(chat) for chat in own]

    before, here, began = spent(url), time.process_time(), time.monotonic()
    begins = [instants.uniform(0, SPREAD) for _ in asks]
    told = await asyncio.gather(*(stream(*each) for each in zip(asks, chats, begins, strict=True)))
    took, here = time.monotonic() - began, time.process_time() - here
    timed = [one for own in told for one in own]
    tokens = sum(count for _, count in timed)
    measured.rates.append(tokens / took)
    measured.firsts.append([first for first, _ in timed])
    measured.here.append(here / tokens)
    measured.gateway.append((spent(url) - before) / tokens)


async def run(args: argparse.Namespace) -> None:
    lines = (ROOT / "training" / "prompts" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for text in (json.loads(line)["turns"][0] for line in lines) if len(text) < 400]
    chosen = random.Random(0).sample(texts, args.streams * args.questions)
    every: list[list[Message]] = [[{"role": "user", "content": text}] for text in chosen]
    chats = [every[first :: args.streams] for first in range(args.streams)]
    sides = {"grpc": Measured(), "gateway": Measured()}
    connections = [Gateway(args.url, args.model, args.tokens) for _ in range(args.streams)]
    async with AsyncClient(args.triton) as service:

        async def direct(chat: list[Message]) -> Timed:
            return await over_grpc(service, args.tokens, chat)

        asks: dict[str, list[Ask]] = {"grpc": [direct] * args.streams, "gateway": [one.ask for one in connections]}
        for number in range(args.rounds + 1):
            for side in sorted(sides, reverse=bool(number % 2)):
                measured = sides[side] if number else Measured()  # the first round warms up
                await round_of(asks[side], chats, args.url, measured)
                print(
                    f"round {number} {side}: {measured.rates[-1]:.1f} tokens/s, first token "
                    f"{statistics.median(measured.firsts[-1]) * 1e3:.1f} ms; a token takes {measured.here[-1] * 1e3:.2f} ms "
                    f"of a core here, {measured.gateway[-1] * 1e3:.2f} in the gateway",
                    flush=True,
                )
        for number, chat in enumerate(every[: args.alone]):
            await direct(chat)  # else whoever asks first would warm the prefix cache for the other
            for side in sorted(sides, reverse=bool(number % 2)):
                sides[side].alone.append((await asks[side][0](chat))[0])
    for connection in connections:
        connection.close()
    report(args.streams, sides["grpc"], sides["gateway"])


def report(streams: int, grpc: Measured, gateway: Measured) -> None:
    ratios = [one / other for one, other in zip(gateway.rates, grpc.rates, strict=True)]
    pairs = zip(gateway.firsts, grpc.firsts, strict=True)
    later = [1e3 * (statistics.median(one) - statistics.median(other)) for one, other in pairs]
    medians = [1e3 * statistics.median(first for firsts in side.firsts for first in firsts) for side in (grpc, gateway)]
    alone = [1e3 * (one - other) for one, other in zip(gateway.alone, grpc.alone, strict=True)]
    here = [1e3 * statistics.median(side.here) for side in (grpc, gateway)]
    print(
        f"{streams} streams: gateway / gRPC {statistics.median(ratios):.3f} in tokens/s at the median of {len(ratios)} rounds "
        f"({min(ratios):.3f} to {max(ratios):.3f})\n"
        f"first token: {medians[0]:.1f} ms over gRPC, {medians[1] - medians[0]:+.1f} at the median of all "
        f"({min(later):+.1f} to {max(later):+.1f} by round); one question at a time {statistics.median(alone):+.1f} ms\n"
        f"a token takes {1e3 * statistics.median(gateway.gateway):.2f} ms of a core in the gateway; in the client "
        f"{here[0]:.2f} over gRPC, {here[1]:.2f} over HTTP"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway_overhead", description=__doc__)
    parser.add_argument("--triton", default="127.0.0.1:8001", help="(default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:9000/v1", help="of the gateway (default: %(default)s)")
    parser.add_argument("--model", default="d2sd", help="(default: %(default)s)")
    parser.add_argument("--streams", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2, help="of each stream (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--alone", type=int, default=20, help="questions asked one at a time (default: %(default)s)")
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
