"""What the service tells Prometheus, under vLLM's names with a prefix of our own.

Telling Triton a number costs a message to it, so numbers are gathered here and handed over once a second.
Source of the names: vLLM's metrics, https://docs.vllm.ai/en/latest/usage/metrics.html
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

EVERY = 1.0  # seconds between two handovers
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
COUNTERS = {
    "d2sd:request_success_total": "Requests ended, by reason",
    "d2sd:prompt_tokens_total": "Tokens of prompts",
    "d2sd:generation_tokens_total": "Tokens committed to answers",
    "d2sd:cycles_total": "Cycles, each a pass of the target over all running sequences",
    "d2sd:cycle_seconds_total": "Time of the cycles, by stage",
    "d2sd:spec_decode_num_drafts_total": "Target passes spent on answers, one a sequence and cycle",
    "d2sd:spec_decode_num_draft_tokens_total": "Draft tokens verified",
    "d2sd:spec_decode_num_accepted_tokens_total": "Draft tokens accepted",
    "d2sd:spec_decode_num_accepted_tokens_per_pos_total": "Draft tokens accepted, by depth",
    "d2sd:planner_choices_total": "Sequences and cycles, by what was chosen for them",
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
    """Gathers numbers; ``flush`` hands them over.

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
        self._counted: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._levels: dict[str, float] = {}
        self._observed: list[tuple[str, float]] = []
        self._flushed = 0.0

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counted[name, tuple(sorted(labels.items()))] += value

    def level(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._levels[name] = value

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._observed.append((name, value))

    def cycle(
        self, committed: Sequence[int], drafted: Sequence[int], seconds: Mapping[str, float], running: int, waiting: int
    ) -> None:
        """Count a cycle.

        Args:
            committed: tokens of each sequence, the target's own included. drafted: draft tokens verified for each.
            seconds: of the cycle, by stage.
            running, waiting: requests.
        """
        self.count("d2sd:cycles_total")
        self.count("d2sd:generation_tokens_total", sum(committed))
        self.count("d2sd:spec_decode_num_drafts_total", len(committed))
        self.count("d2sd:spec_decode_num_draft_tokens_total", sum(drafted))
        self.count("d2sd:spec_decode_num_accepted_tokens_total", sum(committed) - len(committed))
        for depth in range(max(committed, default=1) - 1):
            reached = sum(tokens - 1 > depth for tokens in committed)
            self.count("d2sd:spec_decode_num_accepted_tokens_per_pos_total", reached, position=str(depth))
        for stage, took in seconds.items():
            self.count("d2sd:cycle_seconds_total", took, stage=stage)
        if committed:
            self.observe("d2sd:inter_token_latency_seconds", sum(seconds.values()) * len(committed) / sum(committed))
        self.level("d2sd:num_requests_running", running)
        self.level("d2sd:num_requests_waiting", waiting)

    def flush(self, at_once: bool = False) -> None:
        """Hand over what was gathered, if the last time is long enough ago or ``at_once``."""
        now = time.monotonic()
        if not at_once and now - self._flushed < EVERY:
            return
        self._flushed = now
        for (name, labels), value in self._counted.items():
            self._metric(name, labels).increment(value)
        for name, value in self._levels.items():
            self._metric(name).set(value)
        for name, value in self._observed:
            self._metric(name).observe(value)
        self._counted.clear()
        self._levels.clear()
        self._observed.clear()

    def _metric(self, name: str, labels: Labels = ()) -> Any:
        if (name, labels) not in self._metrics:
            more = {"buckets": list(SECONDS)} if name in HISTOGRAMS else {}
            self._metrics[name, labels] = self._families[name].Metric(labels={"model": "d2sd", **dict(labels)}, **more)
        return self._metrics[name, labels]
