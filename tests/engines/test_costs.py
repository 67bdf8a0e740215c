"""Costs: looked up, corrected, kept; measured of engines that take as long as they say, by a clock of their own."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from engines import costs
from engines.costs import Costs, Table, load, measure, save


def table(**changes):
    options = {"rows": [1, 4, 8], "seconds": [0.01, 0.01, 0.03], "widths": [1, 8], "context": [1e-6, 3e-6], "sequence": 0.001}
    return Table(**options | changes)


def test_a_staircase_is_looked_up():
    found = table()(np.array([1, 2, 4, 6, 8, 16]), 1, 0)
    np.testing.assert_allclose(found, [0.01, 0.01, 0.01, 0.02, 0.03, 0.03 + 8 * 0.03 / 8])
    falling = table(seconds=[0.05, 0.02, 0.03])(np.array([1, 4]), 1, 0)
    assert falling[1] < falling[0], "a size that is slower than a larger one stays so"


def test_context_and_sequences_count():
    one, far = (float(table()(np.array([8]), 1, context)[0]) for context in (0, 1000))
    assert far - one == pytest.approx(1000 * 3e-6)
    assert float(table()(np.array([8]), 8, 1000)[0]) == pytest.approx(0.03 + 1000 * 1e-6 + 7 * 0.001)


def says(found, rows):
    return float(found.target(np.array([rows]), 1, 0)[0])


def test_a_call_is_reckoned_as_many_are():
    own = table(steps=[2, 8])
    for rows in (1, 3, 8, 600):
        assert float(own(np.asarray(rows), 1, 50)) == pytest.approx(float(own(np.array([rows]), 1, 50)[0]))


def test_calls_correct_it_where_they_are():
    learned = Costs({"target": table()})
    for _ in range(300):
        learned.observe("target", 8, 1, 0, 0.06)
        learned.observe("target", 1, 1, 0, 0.01)
    assert learned.pace * says(learned, 8) == pytest.approx(0.06, rel=0.05)
    assert learned.pace * says(learned, 1) == pytest.approx(0.01, rel=0.05)
    assert says(learned, 8) / says(learned, 1) == pytest.approx(6, rel=0.05)
    learned.observe("target", 8, 1, 0, 1e9)
    assert learned.pace * says(learned, 8) < 0.07, "one call that was held up is not believed"


def test_a_slow_moment_is_one_for_calls_of_all_sizes_and_engines():
    learned = Costs({"target": table(), "first": table()})
    for _ in range(50):
        learned.observe("target", 1, 1, 0, 0.02)
    first = learned.first(8, 1, 0)
    assert learned.pace * says(learned, 1) == pytest.approx(0.02, rel=0.05)
    assert learned.pace * says(learned, 8) > 0.045
    assert learned.pace * first > 0.045
    assert first == pytest.approx(0.03), "its own table is left alone"


def test_a_file_is_believed_whole_and_of_this_machine_alone(tmp_path):
    identity, file = {"machine": "a", "engines": {"target": "k"}}, tmp_path / "costs.json"
    assert load(file, identity) is None
    save(file, identity, Costs({"target": table()}))
    assert load(file, identity).tables["target"].seconds == [0.01, 0.01, 0.03]
    assert load(file, identity | {"machine": "b"}) is None
    assert load(file, identity | {"engines": {"target": "other"}}) is None
    text = file.read_text()
    for cut in range(0, len(text), 37):
        file.write_text(text[:cut])
        assert load(file, identity) is None
    file.write_text(json.dumps({"identity": identity, "tables": {"target": {"rows": [1]}}}))
    assert load(file, identity) is None
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_costs_that_cannot_be_kept_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Path, "rename", full)
    save(tmp_path / "costs.json", {"machine": "a"}, Costs({"target": table()}))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "costs are not kept: [Errno 28] No space left on device\n"


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


class Clock:
    """Time that passes in engines alone: a busy machine's would decide what is measured."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(costs, "time", clock)
    return clock


class Engine:
    """An engine whose calls take a time that is known: a staircase of 4 ms every 32 rows."""

    ragged, mask_id = True, 9

    def __init__(self, clock, places=4, each=0.0):
        self.clock, self.lengths, self.places, self.each = clock, [], places, each

    def reset(self):
        self.lengths = []

    def room(self, rows):
        return len(self.lengths) < self.places

    def open(self, tokens, rows):
        self.lengths.append(0)
        return len(self.lengths) - 1

    def close(self, sequence):
        pass

    def length(self, sequence):
        return self.lengths[sequence]

    def send(self, array):
        return array

    def read(self, array):
        return array

    def keep(self, rows):
        self.lengths[self.last[0]] += len(rows[0])

    def choose(self, *_):
        return 0

    def forward(self, sequences, *arrays):
        self.last = sequences
        if len(arrays) == 5 or isinstance(arrays[0], np.ndarray):
            rows = arrays[0].size
        else:
            rows = arrays[1].size + sum(map(len, arrays[0]))
            self.lengths[sequences[0]] += len(arrays[0][0])
        self.clock.now += 0.004 * -(-rows // 32) + self.each * sum(self.lengths[sequence] for sequence in sequences)
        return self if isinstance(arrays[0], np.ndarray) else (np.zeros(1), None)


def test_what_is_measured_is_what_calls_take(clock):
    said = []
    found = measure(Engine(clock), [Engine(clock)], 4, 512, said.append)
    assert len(said) == 2
    for name in ("target", "first"):
        took = found.tables[name](np.array([1, 32, 128]), 1, 0)
        assert took[0] == pytest.approx(0.004, rel=0.5)
        assert took[2] / took[1] == pytest.approx(4, rel=0.4)
    assert "rows" in costs.describe(found)
    assert "cores" in costs.machine()


@pytest.mark.parametrize("places", [1, 4])
def test_what_a_context_takes_is_measured_however_few_have_room(clock, places):
    found = measure(Engine(clock, places, each=2e-5), [], 4, 1100, lambda _: None).tables["target"]
    assert found.context == pytest.approx([2e-5] * len(found.widths), rel=0.6)
