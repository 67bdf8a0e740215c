"""How much memory is free, as machines and containers say it, and how many blocks that makes."""

import numpy as np
import pytest

from engines import memory
from engines.engine import EngineError
from engines.memory import GIB, free_memory, pool_blocks


def machine(root, **files):
    for name, text in {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   8388608 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder, limit, usage, stat):
    names = (
        ("memory.max", "memory.current") if folder.endswith("cgroup") else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    return {f"{folder}/{name}": text for name, text in zip((*names, "memory.stat"), (limit, usage, stat), strict=True)}


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),
        (group("sys/fs/cgroup", f"{6 * GIB}\n", f"{5 * GIB}\n", f"anon 1\ninactive_file {GIB}\n"), 2),
        (group("sys/fs/cgroup", "max\n", f"{5 * GIB}\n", "inactive_file 0\n"), 8),
        (group("sys/fs/cgroup", f"{60 * GIB}\n", f"{5 * GIB}\n", "inactive_file 0\n"), 8),
        (group("sys/fs/cgroup/memory", f"{4 * GIB}\n", f"{GIB}\n", "total_inactive_file 0\n"), 3),
        (group("sys/fs/cgroup/memory", f"{2**63 - 4096}\n", f"{GIB}\n", "total_inactive_file 0\n"), 8),
        (group("sys/fs/cgroup", f"{GIB}\n", f"{2 * GIB}\n", "inactive_file 0\n"), 0),
    ],
)
def test_free_memory(tmp_path, files, gib):
    assert free_memory(machine(tmp_path, **files)) == gib * GIB


def test_this_machine_has_some():
    assert 2**20 < free_memory() < 2**50


def test_blocks(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * GIB)
    assert pool_blocks(None, 2**20, enough=500, least=10) == 500
    assert pool_blocks(None, 2**20, enough=5000, least=10) == 2048
    assert pool_blocks(1.5, 2**20, enough=500, least=10) == 1536
    with pytest.raises(EngineError, match=r"limits.kv_memory: found 0.001 GiB, allowed: 0.00977 or more, which one sequence"):
        pool_blocks(0.001, 2**20, enough=500, least=10)
    with pytest.raises(EngineError, match=r"limits.kv_memory: found 2 \(half of what is free\) GiB, allowed: 3.91 or more"):
        pool_blocks(None, 2**20, enough=5000, least=4000)


def test_large_pages_are_asked_for_what_is_private_and_large(tmp_path, monkeypatch):
    page = memory.PAGE
    areas = [
        (page, 9 * page, "rw-p", 0),
        (20 * page + 4096, 40 * page + 8192, "rw-p", 0),  # its whole pages
        (50 * page, 57 * page, "rw-p", 0),  # too small
        (60 * page, 80 * page, "r--p", 0),
        (80 * page, 90 * page, "rw-s", 0),
        (90 * page, 99 * page, "rw-p", 7),  # a file
    ]
    lines = [f"{start:x}-{end:x} {access} 00000000 00:00 {inode}   [name]\n" for start, end, access, inode in areas]
    monkeypatch.setattr(memory, "ROOT", machine(tmp_path, **{"proc/self/maps": "".join(lines)}))
    asked = []

    class Library:
        def __init__(self, name):
            def madvise(start, size, advice):
                asked.append((start // page, size // page, advice))
                return -1  # what is refused changes nothing

            self.madvise = madvise

    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    memory.use_large_pages()
    assert asked == [(1, 8, 14), (1, 8, 25), (21, 19, 14), (21, 19, 25)]
    (tmp_path / "proc/self/maps").unlink()
    memory.use_large_pages()  # nor does a system without such a file
    assert len(asked) == 4


def test_what_moves_to_large_pages_stays_the_same():
    numbers = np.arange(8 * 2**20, dtype=np.int64)
    expected = int(numbers.sum())
    memory.use_large_pages()
    assert int(numbers.sum()) == expected
    assert np.array_equal(numbers[::4096], np.arange(0, len(numbers), 4096))
