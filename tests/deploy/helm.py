"""Helm in a process of its own, which ``python -m tests.deploy.helm`` is: a request as JSON comes in, the answer goes out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRIES = 2


class HelmError(RuntimeError):
    """Helm refuses the chart or its values; the message is its own."""


def ask(**request: Any) -> Any:
    """``chart=…, values=…`` renders, to text by file; ``chart=…`` alone is looked over.

    Helm is written in Go, whose runtime has threads and signal handlers of its own in the process that loads it. Among the many
    others that the tests have loaded by then it once took a worker of pytest with it, so it is alone here; a process that a
    signal ended is started once more, since that is never Helm's verdict.

    Raises:
        HelmError: see there.
    """
    command = [sys.executable, "-m", "tests.deploy.helm"]
    for _ in range(TRIES):
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode >= 0:
            break
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-3000:]}"
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise HelmError(answer["refused"])
    return answer["found"]


def main() -> None:
    import helm_python

    request = json.load(sys.stdin)
    try:
        if "values" in request:
            with helm_python.Chart.load(request["chart"]) as chart:
                answer = {"found": chart.render(request["values"], name="prod", namespace="llm")}
        else:
            answer = {"found": helm_python.lint(request["chart"])}
    except helm_python.HelmError as error:
        answer = {"refused": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
