"""How much memory the K/V of all sequences may take, and in what pages it lies."""

import ctypes
from pathlib import Path

from engines.engine import EngineError

GIB = 2**30
SHARE = 0.5  # of what is free when the server starts
ROOT = Path("/")
PAGE = 2 * 2**20  # bytes of a large one; 4 KiB are usual
AREA = 8 * PAGE  # that large pages are asked for; a thread's stack is less
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # madvise(2)


def pool_blocks(kv_memory: float | None, block_bytes: int, enough: int, least: int) -> int:
    """How many blocks a pool has; every engine of a pipeline has a pool of as many.

    Args:
        kv_memory: GiB, or None for what all sequences can need, and at most half of the memory that is free.
        block_bytes: of one block in all pools together.
        enough: blocks that as many sequences as may run can fill, at their full length. least: blocks that one can.

    Raises:
        EngineError: not even one sequence fits.
    """
    budget = int(SHARE * free_memory()) if kv_memory is None else int(kv_memory * GIB)
    blocks = budget // block_bytes
    if blocks < least:
        found = f"{budget / GIB:.3g}" + (" (half of what is free)" if kv_memory is None else "")
        raise EngineError(
            f"limits.kv_memory: found {found} GiB, allowed: {least * block_bytes / GIB:.3g} or more, which one sequence of "
            "limits.length tokens can need"
        )
    return min(blocks, enough) if kv_memory is None else blocks


def free_memory(root: Path = ROOT) -> int:
    """Bytes that can be had without taking them from others: what the machine has, and what our control group is allowed.

    Sources: proc_meminfo(5), and the kernel's cgroup-v2 and cgroup-v1 memory documentation.
    """
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    free = [1024 * int(meminfo["MemAvailable"].split()[0])]
    for folder, limit, usage, reclaimable in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed, used = (int((root / folder / name).read_text()) for name in (limit, usage))
            statistics = dict(line.split() for line in (root / folder / "memory.stat").read_text().splitlines())
            free.append(allowed - used + int(statistics.get(reclaimable, 0)))
        except (OSError, ValueError):  # there is no such group, or it has no limit ("max")
            continue
    return max(0, min(free))


def use_large_pages() -> None:
    """Let Linux put what this process holds in pages of 2 MiB, where it has them.

    A pass reads all weights once, and has to find each of their pages first. Whatever Linux refuses stays where it is.
    """
    try:
        advise = ctypes.CDLL(None).madvise
        areas = (ROOT / "proc/self/maps").read_text().splitlines()
    except (OSError, AttributeError):  # not Linux
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for area in areas:
        span, access, _, _, inode, *_ = area.split()
        start, end = (int(place, 16) for place in span.split("-"))
        start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if access == "rw-p" and inode == "0" and end - start >= AREA:
            advise(start, end - start, MADV_HUGEPAGE)
            advise(start, end - start, MADV_COLLAPSE)  # at once; else Linux comes to it in minutes
