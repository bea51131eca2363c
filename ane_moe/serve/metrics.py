"""What Prometheus is told of a server. Tokens and seconds, never a text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ane_moe.serve.line import Line

FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
SLOW = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """The server's own registry: several servers of one process do not meet in it."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ane_moe_requests", "Answered requests.", ("path", "status"), registry=registry
        )
        self.prompt_tokens = Counter(
            "ane_moe_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.cached_tokens = Counter(
            "ane_moe_cached_prompt_tokens",
            "Of them, those that a cache held already.",
            registry=registry,
        )
        self.new_tokens = Counter("ane_moe_new_tokens", "Generated tokens.", registry=registry)
        self.left = Counter(
            "ane_moe_clients_left", "Requests whose client went away.", registry=registry
        )
        self.first_token = Histogram(
            "ane_moe_first_token_seconds",
            "From a request to its first token.",
            buckets=SLOW,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "ane_moe_request_seconds", "From a request to its end.", buckets=SLOW, registry=registry
        )
        self.handed = Histogram(
            "ane_moe_queue_step_seconds",
            "The queue's own work: from one answer to the next, from a token to its reader.",
            buckets=FAST,
            registry=registry,
        )

    def watch(self, line: Line) -> None:
        """Tell how long a line is, whenever asked."""
        for name, what, count in (
            ("ane_moe_requests_waiting", "Requests in the queue.", lambda: line.waiting),
            ("ane_moe_requests_running", "Requests at work.", lambda: line.running),
        ):
            Gauge(name, what, registry=self._registry).set_function(count)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
