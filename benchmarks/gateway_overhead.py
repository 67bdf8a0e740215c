"""``python -m benchmarks.gateway_overhead``: what the gateway costs beside asking Triton itself, in one interleaved run.

Both sides ask the same streams of the same running service, by turns: so many at once, greedy, prompts of eval.jsonl.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from client import AsyncClient, Message, Options

ROOT = Path(__file__).resolve().parent.parent
Timed = tuple[float, int]  # seconds to the first token, tokens


async def over_grpc(service: AsyncClient, chat: list[Message], tokens: int) -> Timed:
    began, first, used = time.monotonic(), 0.0, 0
    async for piece in service.stream(chat, Options(max_tokens=tokens, ignore_eos=True)):
        first, used = first or time.monotonic() - began, piece.output_tokens
    return first, used


async def over_gateway(service: httpx.AsyncClient, model: str, chat: list[Message], tokens: int) -> Timed:
    began, first, used = time.monotonic(), 0.0, 0
    body = {"model": model, "messages": chat, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with service.stream("POST", "/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.monotonic() - began
                if (usage := json.loads(line[6:]).get("usage")) is not None:
                    used = usage["completion_tokens"]
    return first, used


async def measure(ask: Callable[[list[Message]], Awaitable[Timed]], chats: list[list[Message]]) -> tuple[float, list[float]]:
    """Tokens a second over all the streams at once, and each one's seconds to its first token."""
    began = time.monotonic()
    timed = await asyncio.gather(*(ask(chat) for chat in chats))
    return sum(tokens for _, tokens in timed) / (time.monotonic() - began), [first for first, _ in timed]


async def run(args: argparse.Namespace) -> None:
    lines = (ROOT / "training" / "prompts" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["turns"][0] for line in lines]
    short = [text for text in texts if len(text) < 400][: args.streams]
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in short]
    rates: dict[str, list[float]] = {"grpc": [], "gateway": []}
    firsts: dict[str, list[float]] = {"grpc": [], "gateway": []}
    no_bound = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with AsyncClient(args.triton) as grpc, httpx.AsyncClient(base_url=args.url, timeout=600, limits=no_bound) as http:
        for number in range(args.rounds + 1):
            sides = {
                "grpc": lambda chat: over_grpc(grpc, chat, args.tokens),
                "gateway": lambda chat: over_gateway(http, args.model, chat, args.tokens),
            }
            for side in sorted(sides, reverse=bool(number % 2)):
                rate, first = await measure(sides[side], chats)
                if number:  # the first round warms up
                    rates[side].append(rate)
                    firsts[side] += first
                print(
                    f"round {number} {side}: {rate:.1f} tokens/s, first token {statistics.median(first) * 1e3:.1f} ms",
                    flush=True,
                )
    ratio = statistics.median(g / d for g, d in zip(rates["gateway"], rates["grpc"], strict=True))
    added = (statistics.median(firsts["gateway"]) - statistics.median(firsts["grpc"])) * 1e3
    print(f"{args.streams} streams: gateway / gRPC {ratio:.3f} in tokens/s, {added:+.1f} ms to the first token at the median")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway_overhead", description=__doc__)
    parser.add_argument("--triton", default="127.0.0.1:8001", help="(default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:9000/v1", help="of the gateway (default: %(default)s)")
    parser.add_argument("--model", default="d2sd", help="(default: %(default)s)")
    parser.add_argument("--streams", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
