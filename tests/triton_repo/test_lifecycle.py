"""How a server ends: whatever ends it, at whatever moment, nothing of it is left, and nothing is said that nobody needs."""

import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import tritonclient.grpc as grpc

from client import Client, Options, ServiceError
from client.request import to_tensors
from triton_repo import processes

ROOT = Path(__file__).resolve().parents[2]
STARTED = r"starting on 127.0.0.1 …\n"
# A start compiles, the first one of a build on a machine measures what calls take, too, and they say so.
READY = STARTED + r"((costs|engines): [^\n]*\n)*ready: [^\n]*\n"
# Of Triton itself, if a stub dies while it holds the lock of the memory that they share.
ABORTED = r"(terminate called [^\n]*\n( *what\(\): [^\n]*\n)?Signal \(6\) received\.\n)?"


class Served:
    """``serve.py`` as its user runs it, in a folder of temporary files of its own."""

    def __init__(self, build, folder):
        command = [sys.executable, str(ROOT / "triton_repo" / "serve.py"), str(build)]
        command += [option for name in ("http", "grpc", "metrics") for option in (f"--{name}-port", "0")]
        self.folder = folder
        self.log = (folder / "log").open("w+")
        (folder / "tmp").mkdir()
        environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)

    @property
    def said(self):
        return (self.folder / "log").read_text()

    def wait_for(self, pattern):
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (self.name,) = (folder.name for folder in (self.folder / "tmp").glob("d2sd-*"))
        return found

    def ready(self):
        found = self.wait_for(r"ready: HTTP 127.0.0.1:(\d+), gRPC 127.0.0.1:(\d+)")
        self.http, self.grpc = found[1], found[2]
        (self.triton,) = (int(p) for p in children(self.process.pid) if "tritonserver" in program(p))
        return self

    def ended(self, within=10.0):
        """The status; nothing is left of it."""
        status = self.process.wait(timeout=within)
        deadline = time.monotonic() + 3
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        return status

    def left(self):
        """Processes, files and shared memory: all bear the name of the temporary folder, or lie in it."""
        mark = str(self.folder / "tmp")
        running = [f"{p}: {program(p)}" for p in glob.glob("/proc/[0-9]*") if mark in program(p)]
        return glob.glob(f"{mark}/*") + glob.glob(f"/dev/shm/{self.name}*") + running


def program(process):
    try:
        return Path("/proc", str(process).rpartition("/")[2], "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def children(parent):
    def of(process):
        try:
            return (Path(process) / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            return None

    return [process.rpartition("/")[2] for process in glob.glob("/proc/[0-9]*") if of(process) == str(parent)]


@pytest.fixture
def serve(built, tmp_path):
    started = []

    def start(build=None):
        started.append(Served(build or built, tmp_path))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()


def leak(port):
    """A stream that is cancelled after its last response, as any client may: Triton then waits for it for ever."""
    for _ in range(3):
        with grpc.InferenceServerClient(f"127.0.0.1:{port}") as service:
            done = threading.Event()
            service.start_stream(lambda result, error, done=done: done.set())
            inputs = to_tensors({"text_input": "x", "max_tokens": 2}, grpc)
            service.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
            assert done.wait(30)
            time.sleep(0.1)
            service.stop_stream(cancel_requests=True)


def test_a_stop_after_streams_from_a_path_with_a_space(built, serve, tmp_path):
    build = tmp_path / "it's a $(build)"
    build.symlink_to(built)
    served = serve(build).ready()
    client = Client(f"127.0.0.1:{served.grpc}")
    assert client.generate("x", Options(max_tokens=5)).output_tokens == 5
    stream = client.stream("x", Options(max_tokens=300))
    next(stream)
    stream.close()
    leak(served.grpc)
    began = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    assert served.ended() == 0
    assert time.monotonic() - began < 3.5
    assert re.fullmatch(READY + "stopped\n", served.said)


def in_flight(served):
    """A stream that goes on, and the error that ends it."""
    errors, first = [], threading.Event()

    def ask():
        try:
            for _ in Client(f"127.0.0.1:{served.grpc}", timeout=60).stream("x", Options(max_tokens=500, ignore_eos=True)):
                first.set()
        except ServiceError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert first.wait(60)
    return thread, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_before_it_is_ready(serve, number):
    served = serve()
    served.wait_for("starting")
    time.sleep(1.0)
    served.process.send_signal(number)
    killed = number == signal.SIGKILL
    assert served.ended() == (-number if killed else 0)
    assert re.fullmatch(STARTED if killed else STARTED + "stopped\n", served.said)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_it_answers(serve, number):
    """As SIGTERM above: an answer in flight may end, unless the command is killed."""
    served = serve().ready()
    assert any("/dev/shm/" in one for one in served.left())
    thread, errors = in_flight(served)
    served.process.send_signal(number)
    killed = number == signal.SIGKILL
    assert served.ended() == (-number if killed else 0)
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == killed
    assert re.fullmatch(READY if killed else READY + "stopped\n", served.said)


@pytest.mark.parametrize("model", ["d2sd", "preprocessing", "tensorrt_llm_bls", None])
def test_a_part_that_dies_ends_it_and_is_named(serve, model):
    served = serve().ready()
    thread, errors = in_flight(served)
    stubs = {name: process for process, name in processes.stubs(served.triton).items()}
    assert set(stubs) == {"d2sd", "preprocessing", "tensorrt_llm_bls"}
    os.kill(stubs[model] if model else served.triton, signal.SIGKILL)
    began = time.monotonic()
    assert served.ended() == 1
    thread.join(10)
    assert time.monotonic() - began < 3
    assert not thread.is_alive()
    assert len(errors) == 1
    what = f"the process of model {model} has died" if model else "tritonserver was killed by SIGKILL"
    said = READY + (ABORTED if model else "") + f"error: {what}; the service has ended\n"
    assert re.fullmatch(said, served.said), served.said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{served.http}/v2/health/ready")


def test_a_folder_for_temporary_files_that_triton_cannot_use(built, tmp_path, monkeypatch, capsys):
    from triton_repo import serve as command

    folder = tmp_path / "a space"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(command.ServeError, match=r"TMPDIR: found .*a space, allowed: a path of letters"):
        command.Server(built, "127.0.0.1", command.Ports(0, 0, 0))
    assert list(folder.iterdir()) == []


def test_one_port_for_two(built):
    from triton_repo import serve as command

    with pytest.raises(command.ServeError, match="ports: found 8123, 8123, 0, allowed: three different ones"):
        command.Server(built, "127.0.0.1", command.Ports(8123, 8123, 0))
