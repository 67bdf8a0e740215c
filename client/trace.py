"""A request's trace for people: a page that a browser shows, or Chrome's trace format, which Perfetto opens."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

Trace = Mapping[str, Any]  # as the service tells it (docs/triton.md)
FORMATS = (".html", ".json")


def write(trace: Trace, file: Path, prompt: str = "") -> None:
    """Write a trace as the file's ending says.

    Raises:
        ValueError: neither a page's nor JSON's.
    """
    check(file)
    made = page(trace, prompt) if file.suffix == ".html" else json.dumps(chrome(trace), ensure_ascii=False)
    file.write_text(made, encoding="utf-8")


def check(file: Path) -> None:
    """Refuse a file whose ending no trace has."""
    if file.suffix not in FORMATS:
        raise ValueError(f"--trace: found {file.name!r}, allowed: a name that ends in {' or '.join(FORMATS)}")


def page(trace: Trace, prompt: str = "") -> str:
    """One HTML file that needs nothing else: no network, no other file."""
    told = json.dumps({"trace": trace, "prompt": prompt}, ensure_ascii=False)
    # What ends a script, or makes it one within another, begins with this.
    told = told.replace("<", "\\u003c")
    return (files("client") / "trace.html").read_text(encoding="utf-8").replace("TRACE", told, 1)


def chrome(trace: Trace) -> dict[str, Any]:
    """A track of cycles, each with its stages within it, and a counter of the tokens that they bring.

    Times are whole µs: Perfetto drops an event that overlaps another one of its track, were it by a rounding. Texts are quoted,
    so that spaces are seen; besides, Perfetto has taken a backslash before a string's end for the quote's.

    Source: "Trace Event Format" of Chrome's tracing project, events of the phases X, C and M.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"D²SD, {trace['mode']}"}}]
    at = 0
    for number, cycle in enumerate(trace["cycles"], 1):
        began = at = max(at, round(cycle["began"] * 1e6))
        inside, passed = [], 0.0
        for stage, seconds in cycle["laps"]:
            passed += seconds
            until = began + round(passed * 1e6)
            inside.append({"ph": "X", "name": stage, "cat": "stage", "pid": 1, "tid": 1, "ts": at, "dur": until - at})
            at = until
        tokens = len(cycle["said"])
        args = {"text": _quoted(cycle["text"]), "tokens": tokens, "verified": len(cycle["tokens"]), "batch": cycle["batch"]}
        args |= {"tree": _tree(trace, cycle), "planner": cycle["choice"]}
        name = f"cycle {number}: {tokens} {'token' if tokens == 1 else 'tokens'}"
        whole = {"ph": "X", "name": name, "cat": "cycle", "pid": 1, "tid": 1, "ts": began, "dur": at - began}
        events += [whole | {"args": args}, *inside]
        events.append({"ph": "C", "name": "tokens a pass", "pid": 1, "ts": began, "args": {"tokens": tokens}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"left_out": trace["left_out"]}}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tree(trace: Trace, cycle: Mapping[str, Any]) -> list[str]:
    """A line for each node: its place, text, value and origin, and whether it was accepted."""
    pieces, depths, lines = trace["tokens"], [0], []
    for node, (token, parent) in enumerate(zip(cycle["tokens"], cycle["parents"], strict=True)):
        if node:
            depths.append(depths[parent] + 1)
        piece = pieces[str(token)]
        text = _quoted(piece) if isinstance(piece, str) else bytes(piece).hex(" ")
        by = "+".join(name for bit, name in enumerate(trace["origins"]) if cycle["origins"][node] >> bit & 1)
        behind = f" behind {cycle['boundaries'][node]}" if cycle["boundaries"][node] >= 0 else ""
        accepted = " accepted" if node in cycle["accepted"] else ""
        lines.append(f"{node} < {parent}: {'  ' * depths[node]}{text} {cycle['values'][node]:.3f} {by}{behind}{accepted}")
    return lines
