"""What a server counts, in Prometheus' format: requests, their times, the queue, tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # upper bounds of the histogram
METHODS = ("GET", "POST", "HEAD", "OPTIONS")
OTHER = "other"  # paths and methods that no route has: whoever asks for many makes no many series
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        there: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("fromage_requests", "Requests by their answer.", ["route", "method", "status"], **there)
        self.seconds = Histogram(
            "fromage_request_seconds", "Time of a request, a stream's to its end.", ["route"], buckets=SECONDS, **there
        )
        self.queue = Gauge("fromage_queue_length", "Requests that wait for the model.", **there)
        self.prompt_tokens = Counter("fromage_prompt_tokens", "Tokens of prompts, k for each image.", **there)
        self.generated_tokens = Counter("fromage_generated_tokens", "Tokens of answers.", **there)

    def page(self) -> bytes:
        """All counts."""
        return generate_latest(self.registry)


class Measured:
    """ASGI middleware that counts requests, refused ones too, and their time."""

    def __init__(self, app: Any, metrics: Metrics, paths: Iterable[str]) -> None:
        """paths: of the routes, with names in braces."""
        self.app, self.metrics = app, metrics
        self.routes = {path: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))) for path in paths}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, begun = "none", time.perf_counter()  # none: the client left before an answer

        async def seen(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        route = next((path for path, form in self.routes.items() if form.fullmatch(scope["path"])), OTHER)
        try:
            await self.app(scope, receive, seen)
        finally:
            method = scope["method"] if scope["method"] in METHODS else OTHER
            self.metrics.requests.labels(route, method, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begun)
