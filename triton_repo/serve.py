"""``python triton_repo/serve.py build/``: serve a build with Triton Inference Server, until Ctrl-C."""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engines.build_directory import BuildDirectory, BuildDirectoryError
from engines.engine import EngineError

ASIDE = Path(sys.prefix) / "tritonserver"  # where the Makefile puts the server that a PyPI package ships
ADVICE = f"pip install --no-deps --target {ASIDE} nvidia-pytriton==0.7.0"
READY_WITHIN = 300  # seconds


class ServeError(RuntimeError):
    """The server cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int


def command(build: Path, host: str, ports: Ports, backends: Path) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment.

    NVIDIA's container has ``tritonserver`` on PATH; elsewhere it is the one that the PyPI package nvidia-pytriton ships, of
    which only the binary, the Python backend and this interpreter's stub are used.

    Args:
        backends: an empty folder to put a backend directory together in.

    Raises:
        ServeError: there is no server.
    """
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    environment["VIRTUAL_ENV"] = sys.prefix
    repository = build.resolve() / "model_repository"
    options = [f"--model-repository={repository}", "--exit-on-error=true", "--log-info=false", "--log-warning=true"]
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
    python = backends / "python"
    python.mkdir()
    for file in [*(shipped / "backends" / "python").iterdir(), stub]:
        (python / file.name).symlink_to(file)
    libraries = [
        sysconfig.get_config_var("LIBDIR"),
        str(ASIDE / "nvidia_pytriton.libs"),
        environment.get("LD_LIBRARY_PATH"),
    ]
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    return [str(shipped / "bin" / "tritonserver"), *options, f"--backend-directory={backends}"], environment


class Server:
    """A running Triton on a build; as a context manager it is stopped at the end.

    Args:
        build: a build directory.
        ports: 0 picks a free one.
        log: where the server's own output goes; None leaves it on the terminal.

    Raises:
        BuildDirectoryError: the directory cannot be served.
        EngineError: its engines cannot run on this machine.
        ServeError: no server, an occupied port, or the server did not become ready.
    """

    def __init__(self, build: Path, host: str, ports: Ports, log: Path | None = None) -> None:
        BuildDirectory.open(build).check_machine()
        self.host = host
        self.ports = Ports(*(claim(host, port) for port in (ports.http, ports.grpc, ports.metrics)))
        self._backends = tempfile.TemporaryDirectory(prefix="d2sd-backends-")
        arguments, environment = command(build, host, self.ports, Path(self._backends.name))
        self.log = log
        output = log.open("wb") if log else None
        self.process = subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT if log else None)

    def wait_until_ready(self) -> None:
        """Raise ServeError if the server ends or takes too long."""
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                where = f"; its output is in {self.log}" if self.log else "; its output is above"
                raise ServeError(f"tritonserver ended with status {self.process.returncode} before it was ready{where}")
            try:
                with urllib.request.urlopen(f"http://{self.host}:{self.ports.http}/v2/health/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.2)
        raise ServeError(f"tritonserver was not ready after {READY_WITHIN} s")

    def stop(self) -> None:
        """Let the server finish what it is doing, and end it if that takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._backends.cleanup()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


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
    args = parser.parse_args(arguments)
    try:
        usual = BuildDirectory.open(args.build).manifest["triton"]
        ports = Ports(
            *(usual[f"{n}_port"] if (p := getattr(args, f"{n}_port")) is None else p for n in ("http", "grpc", "metrics"))
        )
        with Server(args.build, args.host or usual["host"], ports) as server:
            print(f"starting on {server.host} …", flush=True)
            server.wait_until_ready()
            print(
                f"ready: HTTP {server.host}:{server.ports.http}, gRPC {server.host}:{server.ports.grpc}, "
                f"metrics {server.host}:{server.ports.metrics}; Ctrl-C stops it",
                flush=True,
            )
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return server.process.wait()
    except (BuildDirectoryError, EngineError, ServeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
