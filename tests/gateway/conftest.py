"""A tiny pipeline, real Tritons on it, and gateways before them."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import shared
from triton_repo.serve import Ports, Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return shared.built(shared.pipeline(tmp_path_factory))


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
    log = tmp_path_factory.mktemp("triton") / "log"
    with serving(built, log) as running:
        yield running
        fault = running.fault()
    # What its clients see of a death is a closed connection.
    assert fault is None, f"{fault}; the end of its log:\n{log.read_text(errors='replace')[-5000:]}"


@pytest.fixture(scope="module")
def url(triton):
    with opened("--triton", f"127.0.0.1:{triton.ports.grpc}") as address:
        yield address
