"""How much memory is free, as machines and containers say it, and how many blocks that makes."""

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
