"""The load benchmark's own judgement, and that its page can be written."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from benchmarks.load.report import write_report
from benchmarks.load.storm import LEAVE, WRONG, Planned, judge, plan, watch
from benchmarks.load.traffic import Outcome
from client import Options


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


def test_the_page_has_a_part_for_every_figure(tmp_path):
    figures = {
        "mode": "d2sd",
        "cancelled_crowd": {"alone": 0.5, "behind": 0.55, "ratio": 1.1},
        "throughput": {"rows": [{"streams": n, "mode": "d2sd", "tokens_per_second": 10.0 * n} for n in (1, 4)]},
    }
    write_report(figures, tmp_path / "load.md")
    page = (tmp_path / "load.md").read_text()
    assert "A short request takes 0.55 s, alone 0.50 s: 1.10 times as long." in page
    assert "| 4 | 40 |" in page
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_gaps_and_firsts():
    seen = Outcome(time.monotonic(), at=[0.5, 1.0, 3.0], tokens=[1, 2, 3])
    assert (seen.first, seen.whole, seen.gaps(), seen.gaps(since=2)) == (0.5, 3.0, [0.5, 2.0], [2.0])
