"""A tiny pipeline, real Tritons on it, and gateways before them."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.build import build
from export.config import load
from tests import tiny
from triton_repo.serve import Ports, Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def built():
    """Built once, whichever worker comes first; a later run finds its engines."""
    root = ROOT / "build" / "gateway-tests"
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for checkpoint in ("target", "first", "second"):
            shutil.rmtree(root / checkpoint, ignore_errors=True)
        build(load(tiny.save_pipeline(root)), root / "build")
    return root / "build"


@contextmanager
def serving(built, log):
    with Server(built, "127.0.0.1", Ports(0, 0, 0), log=log) as running:
        running.wait_until_ready()
        yield running


@contextmanager
def opened(*options):
    """A gateway of its own process; yields the address of its API."""
    command = [sys.executable, "-m", "gateway", "--port", "0", "--log-level", "warning", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        ready = process.stdout.readline()
        yield re.match(r"ready: (http://127.0.0.1:\d+/v1); Ctrl-C stops it", ready).group(1)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def triton(built, tmp_path_factory):
    with serving(built, tmp_path_factory.mktemp("triton") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def url(triton):
    with opened("--triton", f"127.0.0.1:{triton.ports.grpc}") as address:
        yield address
