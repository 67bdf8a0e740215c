"""What the processor can do."""

from functools import lru_cache
from pathlib import Path


def has(*features: str) -> bool:
    """Whether the CPU has all of these, by Linux's names."""
    return set(features) <= _features()


@lru_cache(maxsize=1)
def _features() -> frozenset[str]:
    try:
        return frozenset(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return frozenset()
