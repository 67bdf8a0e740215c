"""Server-sent events out of their bytes, however these come in."""

import json

import pytest

from client.request import Events

TEXTS = ["a", "", "日本", "one\u2028two\x85three\u2029four\x1cfive", "two\nlines\r\n"]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_event_ends_with_its_line_alone(size, end):
    said = "".join(f"data: {json.dumps(text, ensure_ascii=False)}{end}{end}" for text in TEXTS).encode()
    events = Events()
    chunks = [said[start : start + size] for start in range(0, len(said), size)]
    assert [json.loads(one) for chunk in chunks for one in events.take(chunk)] == TEXTS
