"""``python -m benchmarks.gateway_overhead``: what the gateway costs beside asking Triton itself, in one interleaved run.

Both sides ask the same of the same running service: greedy, prompts of eval.jsonl, which the first round makes known to the
prefix cache. The gateway is asked over connections that stay open, by a client that reads lines and no more: it shares the
machine's cores and is not what is measured.

* Tokens a second, by turns: in a round so many streams begin at random instants, the same on both sides, and each asks one
  question after another.
* The time to the first token, which a cycle of the service blurs by more than the gateway takes: these streams ask many short
  questions, each by one side and then by the other, so that both meet the same load. And one question at a time.
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
SHORT = 4  # tokens of an answer to a short question
Chat = list[Message]
Timed = tuple[float, int]  # seconds to the first token, tokens
Ask = Callable[[Chat, int], Awaitable[Timed]]  # a chat, tokens of its answer


@dataclass
class Side:
    """Who asks, one for each stream, and what was measured.

    Attributes:
        rates: tokens a second of every round. here, gateway: seconds of a core that a token took in this process and there.
        firsts: seconds to the first tokens of short questions, alone: of questions asked one at a time.
    """

    asks: Sequence[Ask]
    rates: list[float] = field(default_factory=list)
    here: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


class Connection:
    """One open connection to the gateway."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = urlsplit(url), model
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, chat: Chat, tokens: int) -> Timed:
        began, first, used = time.monotonic(), 0.0, 0
        asked = {"model": self.model, "messages": chat, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
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


async def over_grpc(service: AsyncClient, chat: Chat, tokens: int) -> Timed:
    began, first, used = time.monotonic(), 0.0, 0
    async for piece in service.stream(chat, Options(max_tokens=tokens, ignore_eos=True)):
        first, used = first or time.monotonic() - began, piece.output_tokens
    return first, used


def spent(url: str) -> float:
    """Seconds of a core that the gateway has used so far, by its own metrics."""
    with urllib.request.urlopen(urlsplit(url)._replace(path="/metrics").geturl()) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("process_cpu_seconds_total ")))


async def round_of(side: Side, chats: Sequence[list[Chat]], tokens: int, url: str) -> None:
    """Let every stream ask its chats, one after the other."""
    instants = random.Random(0)

    async def stream(ask: Ask, own: list[Chat], begin: float) -> int:
        await asyncio.sleep(begin)
        return sum([(await ask(chat, tokens))[1] for chat in own])

    before, here, began = spent(url), time.process_time(), time.monotonic()
    begins = [instants.uniform(0, SPREAD) for _ in chats]
    came = sum(await asyncio.gather(*(stream(*each) for each in zip(side.asks, chats, begins, strict=True))))
    side.rates.append(came / (time.monotonic() - began))
    side.here.append((time.process_time() - here) / came)
    side.gateway.append((spent(url) - before) / came)


async def short_questions(sides: Sequence[Side], chats: Sequence[list[Chat]], count: int) -> None:
    """Let every stream ask ``count`` questions, by each side in turn."""

    async def stream(number: int) -> None:
        for turn in range(count):
            side = sides[(number + turn) % len(sides)]
            chat = chats[number][turn // len(sides) % len(chats[number])]
            side.firsts.append((await side.asks[number](chat, SHORT))[0])

    await asyncio.gather(*(stream(number) for number in range(len(chats))))


async def run(args: argparse.Namespace) -> None:
    lines = (ROOT / "training" / "prompts" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for text in (json.loads(line)["turns"][0] for line in lines) if len(text) < 400]
    chosen = random.Random(0).sample(texts, args.streams * args.questions)
    every: list[Chat] = [[{"role": "user", "content": text}] for text in chosen]
    chats = [every[first :: args.streams] for first in range(args.streams)]
    connections = [Connection(args.url, args.model) for _ in chats]
    async with AsyncClient(args.triton) as service:

        async def direct(chat: Chat, tokens: int) -> Timed:
            return await over_grpc(service, chat, tokens)

        sides = {"grpc": Side([direct] * args.streams), "gateway": Side([one.ask for one in connections])}
        for number in range(args.rounds + 1):
            for name in sorted(sides, reverse=bool(number % 2)):
                side = sides[name]
                await round_of(side, chats, args.tokens, args.url)
                print(
                    f"round {number} {name}: {side.rates[-1]:.1f} tokens/s; a token takes {side.here[-1] * 1e3:.2f} ms of a "
                    f"core here, {side.gateway[-1] * 1e3:.2f} in the gateway",
                    flush=True,
                )
        for side in sides.values():  # the first round warmed up
            del side.rates[0], side.here[0], side.gateway[0]
        await short_questions([*sides.values()], chats, args.short)
        for number, chat in enumerate(every[: args.alone]):
            await direct(chat, SHORT)  # else whoever asks first would warm the prefix cache for the other
            for name in sorted(sides, reverse=bool(number % 2)):
                sides[name].alone.append((await sides[name].asks[0](chat, SHORT))[0])
    for connection in connections:
        connection.close()
    report(args.streams, sides["grpc"], sides["gateway"])


def report(streams: int, grpc: Side, gateway: Side) -> None:
    ratios = sorted(one / other for one, other in zip(gateway.rates, grpc.rates, strict=True))
    draws = random.Random(0)

    def later(one: Sequence[float], other: Sequence[float]) -> str:
        """The difference of their medians in ms, with a bootstrap's 95 %."""
        again = sorted(
            statistics.median(draws.choices(one, k=len(one))) - statistics.median(draws.choices(other, k=len(other)))
            for _ in range(400)
        )
        found = statistics.median(one) - statistics.median(other)
        return f"{found * 1e3:+.1f} ms ({again[10] * 1e3:+.1f} to {again[-11] * 1e3:+.1f})"

    here = [1e3 * statistics.median(side.here) for side in (grpc, gateway)]
    print(
        f"{streams} streams: gateway / gRPC {statistics.median(ratios):.3f} in tokens/s at the median of {len(ratios)} rounds "
        f"(quartiles {ratios[len(ratios) // 4]:.3f} and {ratios[-1 - len(ratios) // 4]:.3f}); of all rounds "
        f"{statistics.harmonic_mean(gateway.rates) / statistics.harmonic_mean(grpc.rates):.3f}\n"
        f"first token over gRPC {statistics.median(grpc.firsts) * 1e3:.0f} ms at the median of {len(grpc.firsts)}, over the "
        f"gateway {later(gateway.firsts, grpc.firsts)}; one question at a time {later(gateway.alone, grpc.alone)}\n"
        f"a token takes {1e3 * statistics.median(gateway.gateway):.2f} ms of a core in the gateway; in the client "
        f"{here[0]:.2f} over gRPC, {here[1]:.2f} over HTTP"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway_overhead", description=__doc__)
    parser.add_argument("--triton", default="127.0.0.1:8001", help="(default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:9000/v1", help="of the gateway (default: %(default)s)")
    parser.add_argument("--model", default="d2sd", help="(default: %(default)s)")
    parser.add_argument("--streams", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2, help="of each stream in a round (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--short", type=int, default=60, help="short questions of each stream (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=30, help="questions asked one at a time (default: %(default)s)")
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
