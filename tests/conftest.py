"""Triton-language kernels run in its interpreter: tests need no GPU. Set before anything imports ``triton``."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest

from triton_repo.serve import Server


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Beside a failure stands what the servers that the test asked had to say."""
    report = (yield).get_result()
    if report.failed:
        for name, server in getattr(item, "funcargs", {}).items():
            if isinstance(server, Server) and server.log and server.log.exists():
                said = server.log.read_text(errors="replace")[-4000:]
                report.sections.append((f"{name}: {server.fault() or 'alive'}", said))
