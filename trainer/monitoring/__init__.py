"""Watches a run: phases with deadlines, a watchdog, and the health that an orchestrator reads.

Data flow: the training thread enters phases and notes facts in `Progress`, without locks; the watchdog and
the health report read them. Whoever is stuck, and in whatever, they are not. Non-goals: judging how well it
trains.
"""

from trainer.monitoring.monitor import RunMonitor
from trainer.monitoring.phases import Progress, RunCounts, RunPhase

__all__ = ["Progress", "RunCounts", "RunMonitor", "RunPhase"]
