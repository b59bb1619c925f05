"""Whether the run still gets on: phases with deadlines, a watchdog, and what an orchestrator may read.

Data flow: the training thread enters phases and notes facts in `Progress`, without locks; the watchdog and
the health report read them. Whoever is stuck, and in whatever, they are not. Non-goals: judging how well it
trains.
"""

from trainer.watch._deadlines import Deadlines
from trainer.watch._health import health_report
from trainer.watch._parties import Parties, atropos_api
from trainer.watch._phases import Facts, Phase, PhaseStatus, Progress
from trainer.watch._server import HealthServer, Reply
from trainer.watch._watch import Watch
from trainer.watch._watchdog import STACKS_FILE, STUCK, Watchdog

__all__ = [
    "STACKS_FILE",
    "STUCK",
    "Deadlines",
    "Facts",
    "HealthServer",
    "Parties",
    "Phase",
    "PhaseStatus",
    "Progress",
    "Reply",
    "Watch",
    "Watchdog",
    "atropos_api",
    "health_report",
]
