"""Watches a run: phases with deadlines, a watchdog, and the health that an orchestrator reads.

Data flow: the training thread enters phases and notes facts in `Progress`, without locks; the watchdog and
the health report read them. Whoever is stuck, and in whatever, they are not. Non-goals: judging how well it
trains.
"""

from trainer.monitoring.health import health_report
from trainer.monitoring.monitor import RunMonitor
from trainer.monitoring.phases import Progress, RunCounts, RunPhase, phase_deadlines
from trainer.monitoring.server import HealthServer, PageReply
from trainer.monitoring.watchdog import STACKS_FILE, STUCK, Watchdog

__all__ = [
    "STACKS_FILE",
    "STUCK",
    "HealthServer",
    "PageReply",
    "Progress",
    "RunCounts",
    "RunMonitor",
    "RunPhase",
    "Watchdog",
    "health_report",
    "phase_deadlines",
]
