"""One question each: what does this do to those who did nothing?"""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx

from benchmarks.load.traffic import Outcome, Texts, ask
from client import AsyncClient, Message, Options

LONG = 1900  # tokens of a prompt
NO_END = 3  # a token that answers hardly hold, so that all have their full length


@dataclass
class Bench:
    """What a case needs. modes: to compare."""

    client: AsyncClient
    http: str
    texts: Texts
    modes: list[str]
    quick: bool

    async def short(self) -> float:
        """Seconds of a short request."""
        outcome = await ask(self.client, self.texts.take(20), Options(max_tokens=8, end_id=NO_END))
        return outcome.whole

    def times(self, usual: int) -> int:
        return 1 if self.quick else usual


async def long_prompts(bench: Bench) -> dict[str, Any]:
    """The largest gap in a running stream while three long prompts arrive."""
    rows: list[dict[str, Any]] = []
    for _ in range(bench.times(3)):
        seen = Outcome(0.0)
        texts = [bench.texts.take(LONG) for _ in range(3)]  # cut to size first: the stream is not read meanwhile
        running = asyncio.create_task(
            ask(bench.client, bench.texts.take(100), Options(max_tokens=900, end_id=NO_END), seen=seen)
        )
        while len(seen.at) < 30:
            await asyncio.sleep(0.01)
        arrival = time.monotonic() - seen.began
        usual = median(seen.gaps())
        options = Options(max_tokens=4, end_id=NO_END)
        asked = []
        for text in texts:
            asked.append(asyncio.create_task(ask(bench.client, text, options)))
            await asyncio.sleep(0.02)
        long = await asyncio.gather(*asked)
        until = time.monotonic() - seen.began
        running.cancel()
        gaps = [b - a for a, b in zip(seen.at, seen.at[1:], strict=False) if arrival < b < until]
        rows.append({"usual": usual, "largest": max(gaps), "median": median(gaps), "first_tokens": [o.first for o in long]})
    return {"largest_gap": max(row["largest"] for row in rows), "runs": rows}


async def cancelled_crowd(bench: Bench) -> dict[str, Any]:
    """A short request behind twelve long ones that have left, beside one alone."""
    alone, behind = [], []
    for _ in range(bench.times(15)):
        await asyncio.sleep(0.2)  # as there
        alone.append(await bench.short())
        crowd = [bench.texts.take(LONG) for _ in range(12)]
        await asyncio.gather(*(ask(bench.client, text, Options(max_tokens=100), leave_after=1.0) for text in crowd))
        await asyncio.sleep(0.2)  # for the news to arrive
        behind.append(await bench.short())
    ratio = median(b / a for a, b in zip(alone, behind, strict=True))
    return {"alone": alone, "behind": behind, "ratio": ratio}


async def throughput(bench: Bench) -> dict[str, Any]:
    """Tokens a second at so many streams: prompts of 300 tokens, answers of 100. The modes are asked the same."""
    rows = []
    for streams in (1, 4, 8, 16):
        rates: dict[str | None, list[float]] = {mode: [] for mode in bench.modes}
        for number in range(bench.times(max(2, 5 // streams))):
            texts = [bench.texts.take(297) for _ in range(streams)]
            # In turn, and now one first and now the other, so that a slow moment of the machine hits both.
            for mode in bench.modes[:: 1 - 2 * (number % 2)]:
                options = Options(max_tokens=20 if bench.quick else 100, end_id=NO_END, mode=mode)
                prompts = [f"{mode}: {text}" for text in texts]  # nothing of them was computed for the other mode
                began = time.monotonic()
                outcomes = await asyncio.gather(*(ask(bench.client, prompt, options) for prompt in prompts))
                rates[mode].append(sum(o.tokens[-1] for o in outcomes) / (time.monotonic() - began))
        rows += [{"streams": streams, "mode": mode, "tokens_per_second": median(rates[mode])} for mode in bench.modes]
    return {"rows": rows}


async def conversations(bench: Bench) -> dict[str, Any]:
    """First tokens where the beginning of the prompt was computed before, and where it was not."""
    options = Options(max_tokens=24)
    turns, history, first = (3 if bench.quick else 10), 1500, []
    messages: list[Message] = []
    for _ in range(turns):
        messages.append({"role": "user", "content": bench.texts.take(130)})
        known = await ask(bench.client, messages, options)
        fresh = await ask(bench.client, _other(messages), options)
        first.append({"known": known.first, "fresh": fresh.first})
        messages.append({"role": "assistant", "content": known.text})
    ratios, same = [], True
    for _ in range(bench.times(5)):
        opening: list[Message] = [{"role": "user", "content": bench.texts.take(history - 30)}]
        before = await ask(bench.client, opening, options)
        second: list[Message] = [
            *opening,
            {"role": "assistant", "content": before.text},
            {"role": "user", "content": bench.texts.take(20)},
        ]
        known, fresh = await ask(bench.client, second, options), await ask(bench.client, _other(second), options)
        computed = await ask(bench.client, second, replace(options, prompt_logprobs=True))  # all of it, since it is scored
        same = same and computed.text == known.text
        ratios.append(fresh.first / known.first)
    shared = bench.texts.take(800)
    crowds = {}
    for name in ("one system prompt", "own system prompts"):
        chats: list[list[Message]] = [
            [
                {"role": "system", "content": shared if name.startswith("one") else bench.texts.take(800)},
                {"role": "user", "content": bench.texts.take(20)},
            ]
            for _ in range(16)
        ]
        began = time.monotonic()
        outcomes = await asyncio.gather(*(ask(bench.client, chat, Options(max_tokens=8)) for chat in chats))
        crowds[name] = {"seconds": time.monotonic() - began, "last_first_token": max(o.first for o in outcomes)}
    return {"turns": first, "second_turn": median(ratios), "same": same, "crowds": crowds}


def _other(messages: list[Message]) -> list[Message]:
    """The same chat with a beginning that nobody has sent before."""
    first = messages[0]
    return [{"role": first["role"], "content": f"{time.monotonic_ns()} {first['content']}"}, *messages[1:]]


async def slow_reader(bench: Bench) -> dict[str, Any]:
    """A fast reader alone, and beside one who reads a byte a second."""
    options = Options(max_tokens=20 if bench.quick else 100, end_id=NO_END)

    async def fast(text: str) -> float:
        return (await ask(bench.client, text, options)).whole

    alone, beside = [], []
    for _ in range(bench.times(3)):
        text = bench.texts.take(50)
        await fast(text)  # what is known of it, and how it is decoded, is then the same for all that are timed
        alone.append(await fast(text))
        body = {"text_input": bench.texts.take(50), "max_tokens": 100, "end_id": NO_END, "stream": True}
        host, port = bench.http.split(":")
        raw = json.dumps(body).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.connect((host, int(port)))
            head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
            slow.sendall(head.encode() + raw)
            reading = asyncio.create_task(_dawdle(slow))
            # The slow one's answer takes its share of the engine while it is made; what counts is what comes after.
            beside.append(await fast(text))
            beside.append(await fast(text))
            reading.cancel()
    both = beside[::2], beside[1::2]
    return {"alone": median(alone), "while_answered": median(both[0]), "while_unread": median(both[1])}


async def _dawdle(slow: socket.socket) -> None:
    slow.setblocking(False)
    while True:
        await asyncio.get_running_loop().sock_recv(slow, 1)
        await asyncio.sleep(1)


async def hung_up(bench: Bench) -> dict[str, Any]:
    """A short request after four clients of /generate hung up, whose answers Triton goes on asking for."""
    rows = {}
    for name, extra in (("max_tokens 200", {}), ("max_tokens 200, timeout 1 s", {"parameters": {"timeout": 1_000_000}})):
        alone = await bench.short()
        body = {"max_tokens": 200, "end_id": NO_END, **extra}
        async with httpx.AsyncClient(timeout=0.5) as client:
            url = f"http://{bench.http}/v2/models/ensemble/generate"
            posts = [client.post(url, json=body | {"text_input": bench.texts.take(200)}) for _ in range(4)]
            await asyncio.gather(*posts, return_exceptions=True)
        left = time.monotonic()
        after = await bench.short()
        while (await bench.short()) > 1.3 * alone and time.monotonic() - left < 120:
            await asyncio.sleep(0.05)
        rows[name] = {"alone": alone, "after": after, "bound": time.monotonic() - left}
    return rows


CASES: dict[str, Callable[[Bench], Awaitable[dict[str, Any]]]] = {
    "long_prompts": long_prompts,
    "cancelled_crowd": cancelled_crowd,
    "throughput": throughput,
    "conversations": conversations,
    "slow_reader": slow_reader,
    "hung_up": hung_up,
}
