"""Reports a run's health as plain values, the same for /health, /metrics and the file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from trainer.monitoring.phases import Progress, RunPhase
from trainer.monitoring.server import PageReply

if TYPE_CHECKING:
    from prometheus_client import Metric

HealthReport = dict[str, Any]

_HEALTHY = ("starting", "ok")

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "atropos_trainer_"
_GAUGES = {
    "step": "Optimizer steps done; also the version of the policy.",
    "served_version": "Version of the policy that the inference servers are proven to serve.",
    "last_batch_age_seconds": "Seconds since the run took its last batch.",
    "phase_seconds": "Seconds that the present phase has lasted.",
    "phase_deadline_seconds": "Seconds that the present phase may last.",
    "processes": "Processes that train together.",
}
_COUNTERS = {
    "batches_trained": "Batches trained, over all starts of the run.",
    "batches_set_aside": "Batches that were not trained on, over all starts of the run.",
    "batches_possibly_lost": "Batches possibly lost on their way, since this process began.",
}


def health_report(progress: Progress, deadlines: Mapping[RunPhase, float]) -> HealthReport:
    """Report the run's health.

    `status` is `starting`, `ok`, `overdue` (the present phase is past its deadline) or `stopping`.
    """
    status, counts = progress.status, progress.counts
    if status.is_overdue(deadlines):
        word = "overdue"
    elif progress.stopping:
        word = "stopping"
    else:
        word = "ok" if progress.started else "starting"
    age = progress.last_batch_age
    return {
        "status": word,
        "phase": str(status.phase),
        "phase_seconds": round(status.seconds(), 3),
        "phase_deadline_seconds": deadlines[status.phase],
        "waiting_for": status.party,
        "step": counts.step,
        "served_version": progress.served_version(),
        "last_batch_age_seconds": None if age is None else round(age, 3),
        "batches_trained": counts.step,
        "batches_set_aside": max(0, counts.batches - counts.step),
        "batches_possibly_lost": counts.possibly_lost,
        "processes": progress.processes,
        "silent_processes": {str(rank): round(age, 3) for rank, age in progress.silent_processes().items()},
        "pid": os.getpid(),
        "time": round(time.time(), 3),
    }


def is_healthy(report: HealthReport) -> bool:
    """Whether an orchestrator should leave the run alone."""
    return report["status"] in _HEALTHY


def metrics_page(report: Callable[[], HealthReport]) -> Callable[[], PageReply]:
    """Returns the page /metrics; needs prometheus_client, as the configuration has checked."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

    class ReportCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            now = report()
            for name, meaning in _GAUGES.items():
                if now[name] is not None:
                    yield GaugeMetricFamily(_PREFIX + name, meaning, value=now[name])
            for name, meaning in _COUNTERS.items():
                yield CounterMetricFamily(_PREFIX + name, meaning, value=now[name])
            yield GaugeMetricFamily(
                _PREFIX + "silent_processes",
                "Processes of the run from which nothing is heard.",
                value=len(now["silent_processes"]),
            )
            yield GaugeMetricFamily(
                _PREFIX + "healthy", "Whether /health answers 200.", value=is_healthy(now)
            )
            phases = GaugeMetricFamily(_PREFIX + "phase", "1 for the present phase.", labels=["phase"])
            for phase in RunPhase:
                phases.add_metric([str(phase)], float(now["phase"] == phase))
            yield phases

    registry = CollectorRegistry()
    registry.register(ReportCollector())
    return lambda: PageReply(HTTPStatus.OK, _CONTENT_TYPE, generate_latest(registry))
