"""Many requests, an open loop once its pace is found: some leave, some are wrong, and all must end rightly."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.load.offline import Offline
from benchmarks.load.traffic import Outcome, Texts, ask
from client import AsyncClient, Options

LEAVE, WRONG = 0.2, 0.05  # shares of the requests
LONGEST, MOST = 160, 24  # tokens of a prompt, of an answer
STAYS = 4  # mean gaps until a client that leaves does so, in the mean: some wait by then, some are half answered
NONSENSE = (
    Options(top_p=0.0),
    Options(temperature=-1.0),
    Options(max_tokens=0),
    Options(max_tokens=10**9),
    Options(top_k=-3),
    Options(mode="warp"),
)
REFUSALS = ("top_p", "temperature", "max_tokens", "top_k", "mode")
GROWTH = 0.05  # of the memory in the second half, at most
FREED = 5.0  # seconds until everything is free, at most
SETTLING, SLACK = 250, 1.1  # requests that find the pace that the machine keeps up with; the others' gaps are so much longer
LEVELS = ("d2sd:num_requests_running", "d2sd:num_requests_waiting", "d2sd:kv_cache_usage_perc")


@dataclass(frozen=True)
class Planned:
    """A request that will be made. gap: what comes before it, in mean gaps. leaves: after as long as so many."""

    prompt: str
    options: Options
    gap: float
    leaves: float | None
    wrong: bool


def plan(texts: Texts, count: int, modes: list[str], seed: int) -> list[Planned]:
    """Requests from a seed: few distinct prompts, since each is answered offline too, in any mode and length."""
    dice = random.Random(seed)
    prompts = [texts.take(int(LONGEST ** dice.uniform(0.3, 1))) for _ in range(max(8, count // 40))]
    planned = []
    for _ in range(count):
        wrong = dice.random() < WRONG
        options = Options(max_tokens=int(MOST ** dice.uniform(0, 1)), mode=dice.choice([None, *modes]))
        leaves = dice.expovariate(1 / STAYS) if dice.random() < LEAVE and not wrong else None
        planned.append(
            Planned(dice.choice(prompts), dice.choice(NONSENSE) if wrong else options, dice.expovariate(1), leaves, wrong)
        )
    return planned


async def storm(
    client: AsyncClient,
    planned: list[Planned],
    offline: Offline,
    server: int,
    slots: int,
    metrics: Callable[[], Awaitable[str]],
) -> dict[str, Any]:
    """Make the requests. The first ones find the pace that keeps as many at hand as the service has places, however fast the
    machine is; from then on they arrive at that pace, whatever becomes of those before.

    Args:
        server: its process. slots: its places. metrics: what it tells Prometheus.
    """
    memory: list[float] = []
    watching = asyncio.create_task(watch(server, memory))
    tasks: list[asyncio.Task[Outcome]] = []
    began, gap, gaps = time.monotonic(), 0.2, list[float]()
    for number, request in enumerate(planned, 1):
        await asyncio.sleep(request.gap * gap)
        if number < SETTLING:
            gap *= 0.95 if sum(not task.done() for task in tasks) < slots else 1.05
            gaps.append(gap)
        elif number == SETTLING:
            gap = SLACK * mean(gaps[len(gaps) // 2 :])
        leaves = None if request.leaves is None else request.leaves * gap
        tasks.append(asyncio.create_task(ask(client, request.prompt, request.options, leaves)))
        if number % 100 == 0:
            print(f"  {number} of {len(planned)} after {time.monotonic() - began:.0f} s", flush=True)
    outcomes = await asyncio.gather(*tasks)
    seconds = time.monotonic() - began
    watching.cancel()
    held = await _held(metrics)
    verdicts = Counter(judge(request, outcome, offline) for request, outcome in zip(planned, outcomes, strict=True))
    half = memory[len(memory) // 2 :]
    quarters = half[: len(half) // 2], half[len(half) // 2 :]
    answered = [o for o in outcomes if o.finish in ("end", "length")]
    return {
        "requests": len(planned),
        "seconds": seconds,
        "rate": len(planned) / seconds,
        "tokens_per_second": sum(o.tokens[-1] for o in outcomes if o.tokens) / seconds,
        "verdicts": dict(verdicts),
        "first_token_median": sorted(o.first for o in answered)[len(answered) // 2],
        "first_token_99": sorted(o.first for o in answered)[len(answered) * 99 // 100],
        "memory_mib": [round(m) for m in memory],
        "memory_growth": mean(quarters[1]) / mean(quarters[0]) - 1 if quarters[0] else 0.0,
        "held": held,
    }


def faults(figures: dict[str, Any]) -> list[str]:
    """What of a storm's figures must not be."""
    found = [f"{count} requests: {verdict}" for verdict, count in figures["verdicts"].items() if verdict.startswith("WRONG")]
    found += [f"{name}: found {value:g} at the end, allowed: 0" for name, value in figures["held"].items() if value]
    if figures["memory_growth"] > GROWTH:
        found.append(
            f"memory: grew by {100 * figures['memory_growth']:.1f} % in the second half, allowed: {100 * GROWTH:.0f} %"
        )
    return found


def judge(request: Planned, outcome: Outcome, offline: Offline) -> str:
    """How a request ended: rightly, or what was wrong."""
    if request.wrong:
        named = outcome.finish == "refused" and outcome.error.startswith(REFUSALS)
        return "refused as malformed" if named else f"WRONG: {outcome.finish} {outcome.error}"
    if outcome.finish == "refused":
        return "refused as too many" if outcome.error.startswith("limits.waiting") else f"WRONG: {outcome.error}"
    expected = offline.text(request.prompt, request.options.max_tokens or 0)
    if outcome.finish == "left":
        return "left" if expected.startswith(outcome.text) else "WRONG: other text, left"
    if outcome.finish in ("end", "length"):
        return "answered" if outcome.text == expected else "WRONG: other text"
    return f"WRONG: {outcome.finish or 'no end'}"


async def _held(metrics: Callable[[], Awaitable[str]]) -> dict[str, float]:
    """What the service still holds when all requests have ended: those that run and wait, and the part of the K/V cache."""
    began = time.monotonic()
    while True:
        told = await metrics()
        found = {name: re.search(rf"^{name}{{.*}} (\S+)$", told, re.MULTILINE) for name in LEVELS}
        held = {name: float(one[1]) if one else float("nan") for name, one in found.items()}
        if not any(held.values()) or time.monotonic() - began > FREED:
            return held
        await asyncio.sleep(0.5)


async def watch(server: int, memory: list[float]) -> None:
    """Note the memory of the server's processes, in MiB, every second."""
    while True:
        memory.append(sum(_pss(process) for process in _family(server)) / 1024)
        await asyncio.sleep(1)


def _family(process: int) -> list[int]:
    """A process and those that it started."""
    children = [pid for thread in Path(f"/proc/{process}/task").glob("*/children") for pid in thread.read_text().split()]
    return [process, *(one for child in children for one in _family(int(child)))]


def _pss(process: int) -> int:
    """Memory of a process in KiB; what it shares with others is divided among them."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
