"""The processes of a server: they live as long as whoever started them, and nothing of them stays behind."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# Waits for the end of whoever holds the other end of its input, however that comes, and clears up. It is told the group's
# number as the first line.
GUARD = """
read -r group && cat >/dev/null
[ -n "$group" ] && kill -s KILL -- "-$group"
rm -rf -- "$1" "$2"*
"""


class Group:
    """A command and all processes that it starts, in a session of their own: a terminal's signals do not reach them.

    However the process that made it ends, by ``end``, by an error or killed, they are killed and their files are removed.

    Args:
        folder: a folder of theirs. memory: what the names of their shared memory begin with.
        output: where they write; None for a pipe, ``process.stdout``.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, memory: str, output: IO[bytes] | None
    ) -> None:
        guard = ["sh", "-c", GUARD, "d2sd-guard", str(folder), f"/dev/shm/{memory}"]
        quiet = subprocess.DEVNULL
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
        try:
            self.process = subprocess.Popen(
                arguments,
                env=environment,
                stdin=quiet,
                stdout=output or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert self._guard.stdin is not None
            self._guard.stdin.write(f"{self.process.pid}\n".encode())
            self._guard.stdin.flush()
        except BaseException:
            self._guard.communicate()
            raise

    def end(self) -> None:
        """Kill what is left and remove its files."""
        self._guard.communicate()  # closes its input, and waits for it
        self.process.wait()


def stubs(server: int) -> dict[int, str]:
    """The processes in which a server runs its Python models, by number, and the model of each."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if _stat(int(folder.name))[1] != str(server):
                continue
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if arguments[0].endswith(b"triton_python_backend_stub"):
            found[int(folder.name)] = Path(os.fsdecode(arguments[1])).parent.parent.name
    return found


def has_ended(process: int) -> bool:
    """Whether a process of the same user is gone, or dead and only not waited for yet."""
    try:
        return _stat(process)[0] in "ZX"
    except OSError:
        return True


def verdict(status: int) -> str:
    """A child's return code in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat behind the command's name: state, parent, …"""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
