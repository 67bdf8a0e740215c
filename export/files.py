"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(place: Path, shared: bool = False) -> Iterator[Path]:
    """A path for a file or a folder that takes the place of another when the block ends, and is dropped if it fails.

    Args:
        shared: another process may write the same meanwhile.
    """
    own = f".{os.getpid()}" if shared else ""
    partial, old = (place.with_name(f".{place.name}{own}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):
        _remove(leftover)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if place.is_dir():  # no folder can be renamed to one that holds something
            place.rename(old)
        partial.rename(place)
    except BaseException:
        _remove(partial)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
