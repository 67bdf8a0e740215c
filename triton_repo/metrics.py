"""What the service tells Prometheus, under vLLM's names with a prefix of our own.

Telling Triton a number costs a message to it, half a millisecond of waiting. So numbers are gathered here, and a thread of
their own hands them over once a second.
Source of the names: vLLM's metrics, https://docs.vllm.ai/en/latest/usage/metrics.html
"""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

from decoding.scheduler import Scheduler
from decoding.sequence import Sequence

EVERY = 1.0  # seconds between two handovers
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
COUNTERS = {
    "d2sd:request_success_total": "Requests ended, by reason",
    "d2sd:prompt_tokens_total": "Tokens of prompts",
    "d2sd:prefix_cache_queries_total": "Tokens of the prompts that were begun",
    "d2sd:prefix_cache_hits_total": "Those of them whose K/V were known already",
    "d2sd:generation_tokens_total": "Tokens committed to answers",
    "d2sd:cycles_total": "Cycles, each a pass of the target over all running sequences",
    "d2sd:cycle_seconds_total": "Time of the cycles",
    "d2sd:cycle_stage_seconds_total": "The same by stage, as the cycle sees it; rest is what is outside all of them",
    "d2sd:planned_cycles_total": "Cycles that auto planned, by what it chose",
    "d2sd:planned_tokens_total": "Tokens of these cycles, as expected and as they came",
    "d2sd:spec_decode_num_drafts_total": "Target passes spent on answers, one a sequence and cycle",
    "d2sd:spec_decode_num_draft_tokens_total": "Draft tokens verified",
    "d2sd:spec_decode_num_accepted_tokens_total": "Draft tokens accepted",
    "d2sd:spec_decode_num_accepted_tokens_per_pos_total": "Draft tokens accepted, by depth",
}
GAUGES = {
    "d2sd:num_requests_running": "Requests that have a place",
    "d2sd:num_requests_waiting": "Requests that wait for a place",
    "d2sd:kv_cache_usage_perc": "Part of the K/V cache in use, 1 is all",
}
HISTOGRAMS = {
    "d2sd:request_queue_time_seconds": "From a request's arrival to its place",
    "d2sd:time_to_first_token_seconds": "From a request's arrival to its first token",
    "d2sd:inter_token_latency_seconds": "Time of a cycle, by token of a sequence",
    "d2sd:e2e_request_latency_seconds": "From a request's arrival to its end",
}
NAMES = {*COUNTERS, *GAUGES, *HISTOGRAMS}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Gathers numbers, in any thread.

    Args:
        backend: ``triton_python_backend_utils``, or what has its ``MetricFamily``.
    """

    def __init__(self, backend: Any) -> None:
        kinds = {"COUNTER": COUNTERS, "GAUGE": GAUGES, "HISTOGRAM": HISTOGRAMS}
        self._families = {
            name: backend.MetricFamily(name, about, getattr(backend.MetricFamily, kind))
            for kind, named in kinds.items()
            for name, about in named.items()
        }
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._gauges = {name: self._metric(name) for name in ("d2sd:num_requests_running", "d2sd:num_requests_waiting")}
        self._told: dict[str, float] = {}
        self._counted: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._levels: dict[str, float] = {}
        self._observed: list[tuple[str, float]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="d2sd-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Hand the rest over, and let the backend's own objects go: they must not outlive it."""
        self._ended.set()
        self._thread.join()
        self.flush()
        self._metrics.clear()
        self._gauges.clear()
        self._families.clear()

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counted[name, tuple(sorted(labels.items()))] += value

    def level(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._levels[name] = value

    def tell(self, name: str, value: float) -> None:
        """Set a gauge that is looked at before something is decided: at once, where it changes."""
        if self._told.get(name) != value:
            self._told[name] = value
            self._gauges[name].set(value)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        with self._lock:
            self._observed.append((name, value))

    def flush(self) -> None:
        """Hand over what was gathered."""
        with self._lock:
            counted, levels, observed = dict(self._counted), dict(self._levels), self._observed
            self._counted.clear()
            self._levels.clear()
            self._observed = []
        for (name, labels), value in counted.items():
            self._metric(name, labels).increment(value)
        for name, value in levels.items():
            self._metric(name).set(value)
        for name, value in observed:
            self._metric(name).observe(value)

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self.flush()

    def _metric(self, name: str, labels: Labels = ()) -> Any:
        if (name, labels) not in self._metrics:
            more = {"buckets": list(SECONDS)} if name in HISTOGRAMS else {}
            self._metrics[name, labels] = self._families[name].Metric(labels={"model": "d2sd", **dict(labels)}, **more)
        return self._metrics[name, labels]


class Text(Protocol):
    @property
    def stopped(self) -> bool: ...


class Request(Protocol):
    """A request of the serving loop."""

    sequence: Sequence

    @property
    def text(self) -> Text: ...


@dataclass
class Timed:
    """A request that is not counted as ended yet."""

    request: Request
    arrived: float = field(default_factory=lambda: time.monotonic())
    placed: bool = False
    begun: bool = False


class Watch:
    """Counts requests and cycles. ``arrived`` may be called in any thread, ``cycle`` in that of the cycles."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self._metrics, self._scheduler = metrics, scheduler
        self._open: dict[Sequence, Timed] = {}
        self._asked, self._known = scheduler.prompt_tokens, scheduler.reused_tokens
        self._planned: dict[str, float] = {}
        self._spent = dict(scheduler.decoder.clock.seconds)

    def arrived(self, request: Request) -> None:
        self._open[request.sequence] = Timed(request)

    def cycle(self, advanced: list[tuple[Sequence, list[int]]], seconds: float) -> None:
        """Count a cycle: what it advanced, and the time that it took."""
        metrics, now = self._metrics, time.monotonic()
        self._count([len(tokens) for _, tokens in advanced], seconds)
        self._stages(seconds)
        self._plan()
        for sequence in self._scheduler.running:
            if (timed := self._open.get(sequence)) is not None and not timed.placed:
                timed.placed = True
                metrics.observe("d2sd:request_queue_time_seconds", now - seconds - timed.arrived)
                metrics.count("d2sd:prompt_tokens_total", len(sequence.prompt))
        for sequence, _ in advanced:
            if (timed := self._open.get(sequence)) is not None and not timed.begun:
                timed.begun = True
                metrics.observe("d2sd:time_to_first_token_seconds", now - timed.arrived)
        for sequence, timed in list(self._open.items()):
            if sequence.finish:
                del self._open[sequence]
                reason = "stop" if timed.request.text.stopped else sequence.finish
                metrics.count("d2sd:request_success_total", finished_reason=reason)
                metrics.observe("d2sd:e2e_request_latency_seconds", now - timed.arrived)
        metrics.tell("d2sd:num_requests_running", sum(not sequence.finish for sequence in self._scheduler.running))
        metrics.tell("d2sd:num_requests_waiting", len(self._scheduler.waiting))
        metrics.level("d2sd:kv_cache_usage_perc", self._scheduler.decoder.target.used)
        asked, known = self._scheduler.prompt_tokens, self._scheduler.reused_tokens
        metrics.count("d2sd:prefix_cache_queries_total", asked - self._asked)
        metrics.count("d2sd:prefix_cache_hits_total", known - self._known)
        self._asked, self._known = asked, known

    def _stages(self, seconds: float) -> None:
        """Count where the time went since the last cycle."""
        now = dict(self._scheduler.decoder.clock.seconds)
        spent = {stage: value - self._spent.get(stage, 0.0) for stage, value in now.items()}
        spent["rest"] = max(0.0, seconds - sum(spent.values()))
        for stage, value in spent.items():
            if value:
                self._metrics.count("d2sd:cycle_stage_seconds_total", value, stage=stage)
        self._spent = now

    def _plan(self) -> None:
        """Count what the planner chose since the last cycle."""
        planner = self._scheduler.decoder.planner
        if planner is None:
            return
        now = {**planner.chosen, "expected": planner.expected, "came": planner.came}
        for what, value in now.items():
            added = value - self._planned.get(what, 0.0)
            if added and what in ("expected", "came"):
                self._metrics.count("d2sd:planned_tokens_total", added, when=what)
            elif added:
                self._metrics.count("d2sd:planned_cycles_total", added, choice=what)
        self._planned = now

    def _count(self, committed: list[int], seconds: float) -> None:
        """committed: tokens of each sequence, the target's own included."""
        metrics = self._metrics
        metrics.count("d2sd:cycles_total")
        metrics.count("d2sd:cycle_seconds_total", seconds)
        if not committed:
            return
        tokens, sequences = sum(committed), len(committed)
        metrics.count("d2sd:generation_tokens_total", tokens)
        metrics.count("d2sd:spec_decode_num_drafts_total", sequences)
        metrics.count("d2sd:spec_decode_num_draft_tokens_total", self._scheduler.decoder.verified - sequences)
        metrics.count("d2sd:spec_decode_num_accepted_tokens_total", tokens - sequences)
        for depth in range(max(committed) - 1):
            reached = sum(count - 1 > depth for count in committed)
            metrics.count("d2sd:spec_decode_num_accepted_tokens_per_pos_total", reached, position=str(depth))
        metrics.observe("d2sd:inter_token_latency_seconds", seconds * sequences / tokens)
