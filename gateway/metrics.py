"""What the gateway counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """Counters of one gateway; model servers have their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # the process's own time and memory, under their usual names
        self.requests = Counter("d2sd_gateway_requests", "Requests by how they ended", ["path", "status"], registry=registry)
        self.in_flight = Gauge("d2sd_gateway_requests_in_flight", "Requests that are being answered", registry=registry)
        self.seconds = Histogram(
            "d2sd_gateway_request_seconds", "From a request's arrival to its end", ["path"], buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "d2sd_gateway_first_token_seconds",
            "From a streamed request's arrival to its first token",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("d2sd_gateway_tokens", "Tokens by key and kind", ["key", "kind"], registry=registry)
        self.refused = Counter("d2sd_gateway_refused", "Requests refused for their key's limits", ["key"], registry=registry)
        self.replicas = Gauge("d2sd_gateway_replicas_ready", "Replicas that take requests", registry=registry)
