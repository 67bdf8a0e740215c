"""Requests that a server under test has, by its own numbers, which are told once a second."""

import time
from collections.abc import Callable

import httpx

from triton_repo.serve import Server


def requests_at_hand(server: Server, state: str = "") -> int:
    """How many there are; state: ``running`` or ``waiting``, both if nothing is said."""
    text = httpx.get(f"http://127.0.0.1:{server.ports.metrics}/metrics").text
    told = [line for line in text.splitlines() if line.startswith(f"d2sd:num_requests_{state}")]
    return int(sum(float(line.split()[-1]) for line in told))


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
