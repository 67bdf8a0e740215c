"""``python triton_repo/serve.py build/``: serve a build with Triton Inference Server, until Ctrl-C."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to clear up yet: end quietly

import argparse
import os
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from engines.build_directory import BuildDirectory, BuildDirectoryError
from engines.engine import EngineError
from triton_repo import processes

ASIDE = Path(sys.prefix) / "tritonserver"  # where the Makefile puts the server that a PyPI package ships
ADVICE = f"pip install --no-deps --target {ASIDE} nvidia-pytriton==0.7.0"
READY_WITHIN = 300  # seconds
GRACE = 10.0  # seconds that answers may go on after a stop
IDLE = 2.0  # seconds that the server may take to end when nothing is asked of it
# What Triton says on every machine without a GPU, or whenever it is stopped, and what is no concern of anyone's.
NOISE = (
    "CudaDriverHelper has not been initialized",
    "unable to create stream for ensemble: CUDA driver version is insufficient",
    "no pinned memory pool, falling back to non-pinned system memory",
    "Signal (15) received",
    "Non-graceful termination detected",
)


class ServeError(RuntimeError):
    """The server cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int


def command(build: Path, host: str, ports: Ports, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment.

    NVIDIA's container has ``tritonserver`` on PATH; elsewhere it is the one that the PyPI package nvidia-pytriton ships, of
    which only the binary, the Python backend and this interpreter's stub are used.

    Args:
        folder: an empty one, to put together in it what the server is pointed at. Its name names the server's shared memory.

    Raises:
        ServeError: there is no server.
    """
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    environment["VIRTUAL_ENV"] = sys.prefix
    # The backend hands paths to a shell as they are: a link keeps spaces and the like in the build's out of its sight.
    (folder / "models").symlink_to(build.resolve() / "model_repository")
    options = [f"--model-repository={folder / 'models'}", "--disable-auto-complete-config"]
    options += ["--exit-on-error=true", "--log-info=false", "--log-warning=true"]
    options += [f"--backend-config=python,shm-region-prefix-name={folder.name}"]
    options += [f"--http-address={host}", f"--grpc-address={host}", f"--metrics-address={host}"]
    options += [f"--http-port={ports.http}", f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}"]
    options += ["--model-control-mode=none", "--disable-auto-complete-config", "--strict-readiness=true"]
    if not Path("/dev/nvidiactl").exists():
        options += ["--pinned-memory-pool-byte-size=0", "--allow-gpu-metrics=false"]  # else it complains that there is no GPU
    if binary := shutil.which("tritonserver"):
        return [binary, *options], environment
    shipped = ASIDE / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServeError(f"no tritonserver on PATH, and none for Python {version} in {ASIDE}; run: {ADVICE}")
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for file in [*(shipped / "backends" / "python").iterdir(), stub]:
        (python / file.name).symlink_to(file)
    libraries = [
        sysconfig.get_config_var("LIBDIR"),
        str(ASIDE / "nvidia_pytriton.libs"),
        environment.get("LD_LIBRARY_PATH"),
    ]
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    return [str(shipped / "bin" / "tritonserver"), *options, f"--backend-directory={python.parent}"], environment


class Server:
    """A running Triton on a build; as a context manager it is stopped at the end.

    Args:
        build: a build directory.
        ports: 0 picks a free one.
        log: where the server's own output goes; None leaves it on the terminal.
        grace: seconds that answers may go on after a stop.

    Raises:
        BuildDirectoryError: the directory cannot be served.
        EngineError: its engines cannot run on this machine.
        ServeError: no server, an occupied port, or the server did not become ready.
    """

    def __init__(self, build: Path, host: str, ports: Ports, log: Path | None = None, grace: float = GRACE) -> None:
        BuildDirectory.open(build).check_machine()
        if len(set(filter(None, astuple(ports)))) < sum(map(bool, astuple(ports))):
            raise ServeError(f"ports: found {', '.join(map(str, astuple(ports)))}, allowed: three different ones")
        self.host, self.log, self.grace = host, log, grace
        self.ports = Ports(*(claim(host, port) for port in astuple(ports)))
        folder = Path(tempfile.mkdtemp(prefix="d2sd-"))
        try:
            if re.search(r"[^\w./+-]", str(folder)):
                raise ServeError(f"TMPDIR: found {folder.parent}, allowed: a path of letters, digits, and . _ / + -")
            arguments, environment = command(build, host, self.ports, folder)
            output = log.open("wb") if log else None
            self._group = processes.Group(arguments, environment, folder, folder.name, output)
        except BaseException:
            shutil.rmtree(folder)
            raise
        self.process = self._group.process
        self.stubs: dict[int, str] = {}
        if self.process.stdout:
            threading.Thread(target=_relay, args=[self.process.stdout], daemon=True).start()

    def wait_until_ready(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Whether the server is ready; False if it was ``stopped`` before.

        Raises:
            ServeError: it has ended, or takes too long.
        """
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and not stopped():
            if self.process.poll() is not None:
                where = f"; its output is in {self.log}" if self.log else "; its output is above"
                raise ServeError(f"tritonserver {processes.verdict(self.process.returncode)} before it was ready{where}")
            if self._fetch(self.ports.http, "v2/health/ready") is not None:
                self.stubs = processes.stubs(self.process.pid)
                return True
            time.sleep(0.1)
        if stopped():
            return False
        raise ServeError(f"tritonserver was not ready after {READY_WITHIN} s")

    def fault(self) -> str | None:
        """What of a ready server has died. Triton itself goes on as if nothing were, and requests hang."""
        if self.process.poll() is not None:
            return f"tritonserver {processes.verdict(self.process.returncode)}"
        dead = [model for process, model in self.stubs.items() if processes.has_ended(process)]
        return f"the process of model {dead[0]} has died" if dead else None

    def stop(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """Let the server finish what it is doing, and end it if that takes longer than the grace, or when ``hurried``.

        A server that nothing is asked of gets less: Triton waits in vain for streams that their client cancelled after the
        last response.
        """
        if self.process.poll() is None and not self.fault():
            self.process.send_signal(signal.SIGTERM)
            began = idle = time.monotonic()
            while self.process.poll() is None and not hurried():
                now = time.monotonic()
                if self._answering():
                    idle = now
                if now - began > self.grace + IDLE or now - idle > IDLE:
                    break
                time.sleep(0.05)
        self._group.end()

    def _answering(self) -> bool:
        """Whether d2sd has requests."""
        metrics = self._fetch(self.ports.metrics, "metrics") or ""
        found = re.findall(r"^d2sd:num_requests_(?:running|waiting)\b.* (\S+)$", metrics, re.MULTILINE)
        return any(float(number) > 0 for number in found)

    def _fetch(self, port: int, path: str) -> str | None:
        try:
            with urllib.request.urlopen(f"http://{self.host}:{port}/{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            return None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _relay(output: IO[bytes]) -> None:
    """Show what the server says, but the noise."""
    for line in output:
        text = line.decode(errors="replace")
        if not any(noise in text for noise in NOISE):
            sys.stderr.write(text)
            sys.stderr.flush()


def claim(host: str, port: int) -> int:
    """Return a port that is free now: the one asked for, or any for 0.

    Raises:
        ServeError: it is taken, or the address is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port or end what uses it"
            ) from None
        return int(probe.getsockname()[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python triton_repo/serve.py", description=__doc__)
    parser.add_argument("build", type=Path, help="a directory that export/build.py wrote")
    parser.add_argument("--host", help="address to listen on (default: the pipeline's, 127.0.0.1)")
    for name, usual in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, help=f"0 for any free one (default: the pipeline's, {usual})")
    parser.add_argument(
        "--grace", type=float, default=GRACE, help="seconds that answers may go on after a stop (default: %(default)g)"
    )
    args = parser.parse_args(arguments)
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
    try:
        usual = BuildDirectory.open(args.build).manifest["triton"]
        ports = Ports(
            *(usual[f"{n}_port"] if (p := getattr(args, f"{n}_port")) is None else p for n in ("http", "grpc", "metrics"))
        )
        server = Server(args.build, args.host or usual["host"], ports, grace=args.grace)
        try:
            print(f"starting on {server.host} …", flush=True)
            if server.wait_until_ready(lambda: bool(received)):
                print(
                    f"ready: HTTP {server.host}:{server.ports.http}, gRPC {server.host}:{server.ports.grpc}, "
                    f"metrics {server.host}:{server.ports.metrics}; Ctrl-C stops it",
                    flush=True,
                )
            while not received:
                if fault := server.fault():
                    raise ServeError(f"{fault}; the service has ended")
                time.sleep(0.1)
        finally:
            server.stop(hurried=lambda: len(received) > 1)
    except (BuildDirectoryError, EngineError, ServeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
