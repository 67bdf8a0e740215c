"""Memory between what is used is given back to the system."""

import os
import subprocess
import sys

import pytest

from training import memory

HELD = """
import os
from training.memory import give_back

def held():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

began = held()
gaps, kept = [], []
for _ in range(200):
    gaps.append(bytearray(b"x") * 2**20)
    kept.append(bytearray(b"x") * 4096)
gaps.clear()
before = held() - began
give_back()
print(before, held() - began)
"""


def test_gaps_are_given_back():
    keeping = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    told = subprocess.run([sys.executable, "-c", HELD], env=keeping, capture_output=True, text=True, check=True)
    before, after = map(int, told.stdout.split())
    assert before > 150 * 2**20
    assert after < 50 * 2**20


def test_elsewhere_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.give_back()
