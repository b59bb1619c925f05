"""The health report as metrics, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from trainer.monitoring.health import HealthReport, is_healthy
from trainer.monitoring.phases import RunPhase
from trainer.monitoring.server import PageReply

if TYPE_CHECKING:
    from prometheus_client import Metric

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "atropos_trainer_"
_GAUGES = {
    "step": "Optimizer steps done; also the version of the policy.",
    "served_version": "Version of the policy that the inference servers are proven to serve.",
    "last_batch_age_seconds": "Seconds since the run took its last batch.",
    "phase_seconds": "Seconds that the present phase has lasted.",
    "phase_deadline_seconds": "Seconds that the present phase may last.",
}
_COUNTERS = {
    "batches_trained": "Batches trained, over all starts of the run.",
    "batches_set_aside": "Batches that were not trained on, over all starts of the run.",
    "batches_possibly_lost": "Batches possibly lost on their way, since this process began.",
}


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
                _PREFIX + "healthy", "Whether /health answers 200.", value=is_healthy(now)
            )
            phases = GaugeMetricFamily(_PREFIX + "phase", "1 for the present phase.", labels=["phase"])
            for phase in RunPhase:
                phases.add_metric([str(phase)], float(now["phase"] == phase))
            yield phases

    registry = CollectorRegistry()
    registry.register(ReportCollector())
    return lambda: PageReply(HTTPStatus.OK, _CONTENT_TYPE, generate_latest(registry))
