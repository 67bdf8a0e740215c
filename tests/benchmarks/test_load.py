"""The load benchmark's own judgement, and that its page can be written."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from benchmarks.load.report import write_report
from benchmarks.load.storm import LEAVE, NONSENSE, WRONG, Planned, faults, judge, plan, storm, watch
from benchmarks.load.traffic import Outcome
from client import Options, Piece, ServiceError


class Texts:
    def __init__(self):
        self.taken = []

    def take(self, tokens):
        self.taken.append(tokens)
        return f"text {len(self.taken)}"


class Offline:
    def text(self, prompt, tokens):
        return "abcdefgh"[:tokens]


def test_a_seed_is_a_plan():
    planned = plan(Texts(), 2000, ["d2sd", "autoregressive"], seed=3)
    assert planned == plan(Texts(), 2000, ["d2sd", "autoregressive"], seed=3) != plan(Texts(), 2000, ["d2sd"], seed=4)
    assert sum(p.wrong for p in planned) == pytest.approx(2000 * WRONG, rel=0.3)
    assert sum(p.leaves is not None for p in planned) == pytest.approx(2000 * LEAVE * (1 - WRONG), rel=0.2)


@pytest.mark.parametrize(
    ("finish", "text", "error", "verdict"),
    [
        ("length", "abcd", "", "answered"),
        ("length", "abc", "", "WRONG: other text"),
        ("length", "abcx", "", "WRONG: other text"),
        ("left", "ab", "", "left"),
        ("left", "", "", "left"),
        ("left", "b", "", "WRONG: other text, left"),
        ("", "ab", "", "WRONG: no end"),
        ("timeout", "ab", "", "WRONG: timeout"),
        ("refused", "", "limits.waiting: found 64", "refused as too many"),
        ("refused", "", "the engine failed", "WRONG: the engine failed"),
    ],
)
def test_the_verdict_on_a_request(finish, text, error, verdict):
    request = Planned("x", Options(max_tokens=4), 1.0, None, wrong=False)
    assert judge(request, Outcome(0.0, text=text, finish=finish, error=error), Offline()) == verdict


def test_the_verdict_on_nonsense():
    request = Planned("x", Options(top_p=0.0), 1.0, None, wrong=True)
    refused = Outcome(0.0, finish="refused", error="top_p: found 0.0, allowed: above 0 and at most 1")
    assert judge(request, refused, Offline()) == "refused as malformed"
    assert judge(request, Outcome(0.0, finish="length"), Offline()).startswith("WRONG")


async def test_memory_is_that_of_all_processes():
    """A thread of the parent starts the child, as Triton does."""
    held = "bytearray(b'x' * 80 * 2**20)"
    child = f"import time; held = {held}; print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, threading\n"
            f"run = lambda: subprocess.run([sys.executable, '-c', {child!r}])\n"
            "thread = threading.Thread(target=run); thread.start(); thread.join()",
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == b"held\n"
        memory = []
        watching = asyncio.create_task(watch(process.pid, memory))
        while not memory:
            await asyncio.sleep(0.01)
        watching.cancel()
        assert 80 < memory[0] < 150
    finally:
        os.killpg(process.pid, 9)
        process.wait()


class Answering:
    """A service that says the letters of the alphabet; wrong ones if it is told to."""

    def __init__(self, letters="abcdefgh"):
        self.letters = letters

    async def stream(self, prompt, options):
        if options in NONSENSE:
            named = next(name for name, value in vars(options).items() if value is not None)
            raise ServiceError(f"{named}: found what is not allowed")
        await asyncio.sleep(0.001)
        yield Piece(self.letters[: options.max_tokens], options.max_tokens, 1, "length", 5)


def told(running=0, kv=0.0):
    return (
        "# TYPE d2sd:num_requests_running gauge\n"
        f'd2sd:num_requests_running{{model="d2sd"}} {running}\n'
        'd2sd:num_requests_waiting{model="d2sd"} 0\n'
        f'd2sd:kv_cache_usage_perc{{model="d2sd"}} {kv}\n'
    )


@pytest.mark.parametrize(
    ("letters", "levels", "found"),
    [
        ("abcdefgh", [told(2, 0.1), told()], []),
        (
            "abcdefgh",
            [told(1, 0.25)],
            ["running: found 1 at the end", "kv_cache_usage_perc: found 0.25 at the end"],
        ),
        ("abcdefgh", [""], ["running: found nan", "waiting: found nan", "kv_cache_usage_perc: found nan"]),
        ("axcdefgh", [told()], ["requests: WRONG: other text"]),
    ],
)
async def test_a_storm_and_what_it_finds(monkeypatch, letters, levels, found):
    monkeypatch.setattr("benchmarks.load.storm.FREED", 0.7)
    levels = iter([*levels, *[levels[-1]] * 3])

    async def metrics():
        return next(levels)

    planned = plan(Texts(), 60, ["auto"], seed=1)
    figures = await storm(Answering(letters), planned, Offline(), os.getpid(), 4, metrics)
    assert sum(figures["verdicts"].values()) == 60
    named = faults(figures | {"memory_growth": 0.01})
    assert all(part in fault for part, fault in zip(found, named, strict=True)), named
    assert "memory: grew by 7.0 %" in faults(figures | {"memory_growth": 0.07})[-1]


def test_the_page_has_a_part_for_every_figure(tmp_path):
    figures = {
        "ran_on": {
            "storm": "a machine; in f32",
            "cancelled_crowd": "a machine; a build",
            "throughput": "a machine; a build",
        },
        "storm": {
            "requests": 10,
            "rate": 2.0,
            "tokens_per_second": 30.0,
            "verdicts": {"answered": 9, "left": 1},
            "first_token_median": 0.1,
            "first_token_99": 0.2,
            "memory_mib": [1, 2],
            "memory_growth": 0.01,
            "held": {"d2sd:num_requests_running": 0.0, "d2sd:kv_cache_usage_perc": 0.0},
        },
        "cancelled_crowd": {"alone": [0.5, 0.5], "behind": [0.5, 0.6], "ratio": 1.1},
        "throughput": {"rows": [{"streams": n, "mode": "d2sd", "tokens_per_second": 10.0 * n} for n in (1, 4)]},
    }
    write_report(figures, tmp_path / "load.md")
    page = (tmp_path / "load.md").read_text()
    assert "* `storm`: a machine; in f32\n* `cancelled_crowd`, `throughput`: a machine; a build\n" in page
    assert "changed by +1.0 % from" in page
    assert "every row of the cache was free" in page
    assert "A short request takes 0.55 s, alone 0.50 s: 1.10 times as long, the median of 2 pairs." in page
    assert "| 4 | 40 |" in page
    assert (tmp_path / "load.png").stat().st_size > 1000
    figures["storm"]["held"]["d2sd:kv_cache_usage_perc"] = 0.5
    write_report(figures, tmp_path / "load.md")
    assert "NOT FREED at the end: `d2sd:kv_cache_usage_perc` 0.5." in (tmp_path / "load.md").read_text()


def test_gaps_and_firsts():
    seen = Outcome(time.monotonic(), at=[0.5, 1.0, 3.0], tokens=[1, 2, 3])
    assert (seen.first, seen.whole, seen.gaps(), seen.gaps(since=2)) == (0.5, 3.0, [0.5, 2.0], [2.0])
