# SPDX-License-Identifier: Apache-2.0
"""What a server counts, and its text for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Mapping

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of seconds."""

HELP = {
    "accepted_total": "Requests that were accepted.",
    "refused_total": "Requests that were refused since the queue was full, or the server was about to end.",
    "ended_total": "Requests that ended, by how.",
    "queued": "Requests that wait.",
    "running": "Requests that are solved at once.",
    "rounds_total": "Rounds of network calls.",
    "rows_total": "Rows of all rounds.",
    "network_seconds_total": "Seconds of network calls.",
    "window": "Mean rows of a request in the last round.",
    "request_seconds": "Seconds from a request to its end.",
    "queue_seconds": "Seconds that requests waited.",
}


class Histogram:
    """Counts of seconds by bucket."""

    def __init__(self) -> None:
        self.counts = [0] * len(BUCKETS)
        self.count, self.sum = 0, 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.count, self.sum = self.count + 1, self.sum + seconds
        for k, bound in enumerate(BUCKETS):
            self.counts[k] += seconds <= bound

    def lines(self, name: str) -> list[str]:
        """Its lines."""
        found = [f'{name}_bucket{{le="{bound:g}"}} {count}' for bound, count in zip(BUCKETS, self.counts, strict=True)]
        return [*found, f'{name}_bucket{{le="+Inf"}} {self.count}', f"{name}_sum {self.sum:.6f}", f"{name}_count {self.count}"]


class Metrics:
    """Counters, gauges and histograms. Any thread may count and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, str], float] = {(name, ""): 0 for name in HELP if name.endswith("_total")}
        del self._counters["ended_total", ""]
        self._histograms = {"request_seconds": Histogram(), "queue_seconds": Histogram()}

    def count(self, name: str, amount: float = 1, *, how: str = "") -> None:
        """Adds to a counter; `how` is its label."""
        with self._lock:
            self._counters[name, how] = self._counters.get((name, how), 0) + amount

    def time(self, name: str, seconds: float) -> None:
        """Adds to a histogram."""
        with self._lock:
            self._histograms[name].add(seconds)

    def value(self, name: str, how: str = "") -> float:
        """A counter's value."""
        with self._lock:
            return self._counters.get((name, how), 0)

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it, in the text format of Prometheus.

        Args:
            gauges: The present values of what goes up and down.
        """
        lines: list[str] = []
        with self._lock:
            for name, help in HELP.items():
                full = f"paradiff_{name}"
                kind = "counter" if name.endswith("_total") else "histogram" if name in self._histograms else "gauge"
                lines += [f"# HELP {full} {help}", f"# TYPE {full} {kind}"]
                if name in self._histograms:
                    lines += self._histograms[name].lines(full)
                elif kind == "gauge":
                    lines.append(f"{full} {gauges.get(name, 0):g}")
                else:
                    counted = sorted((how, value) for (of, how), value in self._counters.items() if of == name)
                    lines += [f"{full}{_label(how)} {value:.10g}" for how, value in counted]
        return "\n".join(lines) + "\n"


def _label(how: str) -> str:
    return f'{{how="{how}"}}' if how else ""
