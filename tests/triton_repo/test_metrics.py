"""What is told to Triton: gathered over cycles, with nothing lost and nothing told twice."""

from collections import defaultdict
from types import SimpleNamespace

import pytest

from decoding.sequence import Sequence
from triton_repo import metrics
from triton_repo.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics, Watch


class Backend:
    """Stands for ``triton_python_backend_utils``; counts messages."""

    def __init__(self):
        told = self.told = defaultdict(float)
        observed = self.observed = defaultdict(list)
        backend = self
        self.messages = 0

        class Metric:
            def __init__(self, name, labels, buckets):
                self.key = (name, *sorted((k, v) for k, v in labels.items() if k != "model"))
                assert (buckets is not None) == (name in HISTOGRAMS)

            def increment(self, value):
                assert self.key[0] in COUNTERS
                backend.messages += 1
                told[self.key] += value

            def set(self, value):
                assert self.key[0] in GAUGES
                backend.messages += 1
                told[self.key] = value

            def observe(self, value):
                assert self.key[0] in HISTOGRAMS
                backend.messages += 1
                observed[self.key[0]].append(value)

        class MetricFamily:
            COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

            def __init__(self, name, description, kind):
                self.name = name

            def Metric(self, labels, buckets=None):
                return Metric(self.name, labels, buckets)

        self.MetricFamily = MetricFamily


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(value=1000.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.value)
    return now


@pytest.fixture
def scheduler():
    planner = SimpleNamespace(chosen={"text": 2}, expected=3.5, came=4)
    clock = SimpleNamespace(seconds={"target": 5.0})  # of a warm-up
    decoder = SimpleNamespace(verified=0, target=SimpleNamespace(used=0.25), planner=planner, clock=clock)
    return SimpleNamespace(running=[], waiting=[], decoder=decoder, prompt_tokens=100, reused_tokens=50)


def request(length=4):
    return SimpleNamespace(sequence=Sequence([1] * length, 9), text=SimpleNamespace(stopped=False))


def test_two_requests(clock, scheduler):
    backend = Backend()
    gathered = Metrics(backend)
    watch = Watch(gathered, scheduler)
    first, second = request(4), request(6)
    watch.arrived(first)
    watch.arrived(second)
    scheduler.running, scheduler.waiting = [first.sequence], [second.sequence]
    clock.value += 1.5  # a second of waiting, half a second of a cycle
    scheduler.decoder.verified, scheduler.prompt_tokens, scheduler.reused_tokens = 8, 104, 52
    scheduler.decoder.clock.seconds = {"target": 5.25, "tree": 0.125}
    watch.cycle([(first.sequence, [5, 6, 7])], 0.5)
    assert backend.messages == 2
    assert backend.told["d2sd:num_requests_running",] == 1
    assert backend.told["d2sd:num_requests_waiting",] == 1
    clock.value += 0.5
    scheduler.running, scheduler.waiting = [first.sequence, second.sequence], []
    first.sequence.finish = "length"
    scheduler.decoder.verified = 10
    scheduler.decoder.clock.seconds = {"target": 5.75, "tree": 0.125}
    watch.cycle([(first.sequence, [5, 6]), (second.sequence, [7])], 0.5)
    clock.value += 0.5
    scheduler.running = [second.sequence]
    second.sequence.finish, second.text.stopped = "cancelled", True
    watch.cycle([(second.sequence, [8])], 0.5)
    gathered.flush()
    expected = {
        ("d2sd:generation_tokens_total",): 7,
        ("d2sd:prompt_tokens_total",): 10,
        ("d2sd:prefix_cache_queries_total",): 4,
        ("d2sd:prefix_cache_hits_total",): 2,
        ("d2sd:kv_cache_usage_perc",): 0.25,
        ("d2sd:cycles_total",): 3,
        ("d2sd:planned_cycles_total", ("choice", "text")): 2,
        ("d2sd:planned_tokens_total", ("when", "came")): 4,
        ("d2sd:planned_tokens_total", ("when", "expected")): 3.5,
        ("d2sd:cycle_seconds_total",): 1.5,
        ("d2sd:cycle_stage_seconds_total", ("stage", "target")): 0.75,
        ("d2sd:cycle_stage_seconds_total", ("stage", "tree")): 0.125,
        ("d2sd:cycle_stage_seconds_total", ("stage", "rest")): 0.625,
        ("d2sd:spec_decode_num_drafts_total",): 4,
        ("d2sd:spec_decode_num_draft_tokens_total",): 7 + 8 + 9,
        ("d2sd:spec_decode_num_accepted_tokens_total",): 3,
        ("d2sd:spec_decode_num_accepted_tokens_per_pos_total", ("position", "0")): 2,
        ("d2sd:spec_decode_num_accepted_tokens_per_pos_total", ("position", "1")): 1,
        ("d2sd:request_success_total", ("finished_reason", "length")): 1,
        ("d2sd:request_success_total", ("finished_reason", "stop")): 1,
        ("d2sd:num_requests_running",): 0,
        ("d2sd:num_requests_waiting",): 0,
    }
    assert dict(backend.told) == pytest.approx(expected)
    assert backend.observed["d2sd:request_queue_time_seconds"] == pytest.approx([1.0, 1.5])
    assert backend.observed["d2sd:time_to_first_token_seconds"] == pytest.approx([1.5, 2.0])
    assert backend.observed["d2sd:e2e_request_latency_seconds"] == pytest.approx([2.0, 2.5])
    assert backend.observed["d2sd:inter_token_latency_seconds"] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])


def test_cycles_share_a_message_and_the_last_are_told_at_the_end(scheduler):
    backend = Backend()
    gathered = Metrics(backend)
    gathered.start()
    watch = Watch(gathered, scheduler)
    one = request()
    scheduler.running = [one.sequence]
    for _ in range(100):
        watch.cycle([(one.sequence, [1])], 0.001)
    gathered.close()
    assert backend.told["d2sd:generation_tokens_total",] == 100
    assert len(backend.observed["d2sd:inter_token_latency_seconds"]) == 100
    assert backend.messages < 120
