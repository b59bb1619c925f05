"""Reports a run's health as plain values; the same for /health, /metrics and the file."""

from __future__ import annotations

import os
import time
from typing import Any

from trainer.monitoring.phases import PhaseDeadlines, Progress

HealthReport = dict[str, Any]

_HEALTHY = ("starting", "ok")


def health_report(progress: Progress, deadlines: PhaseDeadlines) -> HealthReport:
    """Report the run's health.

    `status` is `starting`, `ok`, `overdue` (the present phase is past its deadline) or `stopping`.
    """
    status, counts = progress.status, progress.counts
    if deadlines.is_past(status):
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
        "phase_deadline_seconds": deadlines.of(status.phase),
        "waiting_for": status.party,
        "step": counts.step,
        "served_version": progress.served_version(),
        "last_batch_age_seconds": None if age is None else round(age, 3),
        "batches_trained": counts.step,
        "batches_set_aside": max(0, counts.batches - counts.step),
        "batches_possibly_lost": counts.possibly_lost,
        "pid": os.getpid(),
        "time": round(time.time(), 3),
    }


def is_healthy(report: HealthReport) -> bool:
    """Whether an orchestrator should leave the run alone."""
    return report["status"] in _HEALTHY
