"""What a trace looks like to people: a page that holds it whole and runs nothing of it, and events that nest and add up."""

import itertools
import json
import re

import pytest

from client import trace as told_to_people
from client.trace import chrome, page, write
from decoding.trace import Trace
from tests import tiny
from tests.decoding.test_trace import traced
from triton_repo.text import Vocabulary
from triton_repo.trace import told

VOCABULARY = Vocabulary(tiny.tokenizer().backend_tokenizer)
HOSTILE = "</script><script>alert(1)</script><!-- <script> \u2028 TRACE"


@pytest.fixture(scope="module", params=["auto", "d2sd", "autoregressive"])
def trace(request):
    found, sequence, _ = traced(request.param, count=40)
    return json.loads(told(found, VOCABULARY)), sequence


def test_what_the_service_tells(trace):
    cycles, sequence = trace[0]["cycles"], trace[1]
    assert [token for cycle in cycles for token in cycle["said"]] == sequence.answer
    assert "".join(cycle["text"] for cycle in cycles) == VOCABULARY.decode(sequence.answer)
    assert cycles[0]["began"] == 0
    assert all(str(token) in trace[0]["tokens"] for cycle in cycles for token in cycle["tokens"] + cycle["said"])
    # No cycle begins before the one before it has ended, but for the rounding of what is told.
    for one, other in itertools.pairwise(cycles):
        assert other["began"] - one["began"] >= sum(seconds for _, seconds in one["laps"]) - 2e-6


def test_half_a_character_waits_for_its_other_half():
    ids = VOCABULARY.tokenizer.encode("größer 日本語 🎉", add_special_tokens=False).ids
    found = traced("autoregressive", count=len(ids))[0]
    cycles = [cycle.__class__(**vars(cycle) | {"said": [token]}) for cycle, token in zip(found.cycles, ids, strict=True)]
    whole = json.loads(told(Trace("autoregressive", cycles), VOCABULARY))
    texts = [cycle["text"] for cycle in whole["cycles"]]
    assert "".join(texts) == "größer 日本語 🎉"
    assert "" in texts
    cut = json.loads(told(Trace("autoregressive", cycles[:-1], more_cycles=1, more_tokens=1), VOCABULARY))
    assert "".join(cycle["text"] for cycle in cut["cycles"]) == "größer 日本語 "
    assert cut["left_out"] == {"cycles": 1, "tokens": 1}


def test_a_trace_without_cycles():
    empty = json.loads(told(Trace("auto"), VOCABULARY))
    assert len(chrome(empty)["traceEvents"]) == 1
    assert json.dumps(empty, ensure_ascii=False) in page(empty)


def test_the_page_holds_the_trace_and_runs_nothing_of_it(trace):
    hostile = trace[0] | {"tokens": dict.fromkeys(trace[0]["tokens"], HOSTILE)}
    hostile["cycles"] = [cycle | {"text": HOSTILE} for cycle in hostile["cycles"]]
    made = page(hostile, HOSTILE)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", made, re.DOTALL)
    assert [attributes.strip() for attributes, _ in scripts] == ['type="application/json" id="trace"', ""]
    assert made.count("</script") == made.count("<script") == 2
    assert "<!--" not in made
    assert json.loads(scripts[0][1]) == {"trace": hostile, "prompt": HOSTILE}
    # What it shows, it shows as text; and it asks no one for anything.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|https?:(?!//www\.w3\.org/2000/svg)|fetch\(", made
    )
    assert "default-src 'none'" in made


def test_events_nest_and_add_up(trace):
    events = json.loads(json.dumps(chrome(trace[0])))["traceEvents"]
    cycles = [event for event in events if event.get("cat") == "cycle"]
    assert [event["args"]["tokens"] for event in cycles] == [len(cycle["said"]) for cycle in trace[0]["cycles"]]
    assert [event["args"]["tokens"] for event in events if event["ph"] == "C"] == [event["args"]["tokens"] for event in cycles]
    for event, cycle in zip(cycles, trace[0]["cycles"], strict=True):
        place = events.index(event) + 1
        inside = events[place : place + len(cycle["laps"])]
        assert [stage["name"] for stage in inside] == [name for name, _ in cycle["laps"]]
        assert sum(stage["dur"] for stage in inside) == event["dur"]
        assert event["dur"] == pytest.approx(sum(seconds for _, seconds in cycle["laps"]) * 1e6, abs=1)
        assert len(event["args"]["tree"]) == len(cycle["tokens"])
        assert sum(" accepted" in line for line in event["args"]["tree"]) == len(cycle["accepted"])


def test_perfetto_drops_no_event(trace):
    """It drops one that lies across another's end, takes whole µs alone as they are, and has read over the end of a string
    with a backslash before it."""
    told = trace[0] | {"cycles": [cycle | {"text": "\\"} for cycle in trace[0]["cycles"]]}
    events = [event for event in chrome(told)["traceEvents"] if event["ph"] == "X"]
    assert len(events) == sum(1 + len(cycle["laps"]) for cycle in told["cycles"])
    assert events == sorted(events, key=lambda event: event["ts"])
    ends = []
    for event in events:
        assert type(event["ts"]) is type(event["dur"]) is int
        assert event["dur"] >= 0
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        ends.append(event["ts"] + event["dur"])
        assert ends == sorted(ends, reverse=True)
        strings = [event["name"], *event.get("args", {}).get("tree", ()), event.get("args", {}).get("text", "")]
        assert not any(string.endswith("\\") for string in strings)


def test_the_ending_says_what_is_written(trace, tmp_path):
    write(trace[0], tmp_path / "out.html", "why?")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == page(trace[0], "why?")
    write(trace[0], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == json.loads(json.dumps(chrome(trace[0])))
    with pytest.raises(ValueError, match=r"--trace: found 'out.txt', allowed: a name that ends in .html or .json"):
        told_to_people.check(tmp_path / "out.txt")
