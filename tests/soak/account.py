"""The account of a soak: where every batch went, what was done to the parties, and what the run held."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cached_property
from typing import Any

from atropos_client.journal import Journal, LedgerEntry
from tests.soak.processes import Holding, Steadiness
from tests.soak.run import Outcome

MEASURES = {
    "memory": lambda holding: holding.memory,
    "resident": lambda holding: holding.resident,
    "files": lambda holding: holding.files,
    "threads": lambda holding: holding.threads,
}


class Account:
    """Figures of one outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._polls = [passage for passage in outcome.to_api if passage.path == "/batch"]

    # What the API and the proxy know.

    @cached_property
    def handed_out(self) -> Counter[str]:
        """Checksums of the batches that the API gave away."""
        return Counter(poll.batch for poll in self._polls if poll.batch is not None)

    @cached_property
    def groups_handed_out(self) -> Counter[str]:
        """Names of the groups in them."""
        return Counter(name for poll in self._polls for name in poll.groups)

    @cached_property
    def delivered(self) -> Counter[str]:
        """Those of them that reached the trainer whole."""
        return Counter(poll.batch for poll in self._polls if poll.batch is not None and not poll.spoilt)

    @cached_property
    def garbage(self) -> Counter[str]:
        """Checksums of what reached the trainer in place of a reply."""
        return Counter(poll.garbage for poll in self._polls if poll.garbage is not None)

    @property
    def replaced(self) -> int:
        """Batches that were given away, and garbage arrived."""
        return sum(poll.batch is not None and poll.garbage is not None for poll in self._polls)

    @property
    def cut_off(self) -> int:
        """Batches that were given away, and only a part arrived."""
        return self.handed_out.total() - self.delivered.total() - self.replaced

    @property
    def broken_by_the_api(self) -> int:
        """Batches that the API removed and then could not write down."""
        return sum(poll.broken_by_the_server for poll in self._polls)

    @property
    def doubtful(self) -> int:
        """Polls after which nobody on the trainer's side can know whether a batch was lost.

        Not among them is garbage: it came whole, is kept as it came, and is counted as unreadable.
        """
        return sum(poll.spoilt and poll.garbage is None for poll in self._polls)

    # What the trainer knows.

    @cached_property
    def ledger(self) -> list[LedgerEntry]:
        with Journal.read_only(self.outcome.output / "journal") as journal:
            return list(journal.ledger())

    @cached_property
    def outcomes(self) -> Counter[str]:
        """Batches of the ledger by what became of them."""
        return Counter(entry.outcome for entry in self.ledger)

    @cached_property
    def counters(self) -> dict[str, int]:
        """What the trainer counted, as it said in the end."""
        counted = re.search(r"^Counters, as in metrics\.jsonl: (.+)\.$", self.outcome.log, re.MULTILINE)
        pairs = re.findall(r"(\w+) (\d+)", counted[1]) if counted else []
        return {name: int(count) for name, count in pairs}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.outcome.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    # What the processes held.

    def steadiness(self, party: str, measure: str) -> Steadiness:
        holdings: list[Holding] = getattr(self.outcome.sampler, party)
        return Steadiness.of(holdings, MEASURES[measure])

    def print(self) -> None:
        """Show everything."""
        outcome, environment = self.outcome, self.outcome.environment
        rows: dict[str, Any] = {
            "batches pushed": f"{environment.pushed.total()} {dict(environment.pushed)}",
            "handed out by the API": self.handed_out.total(),
            "removed by the API that then answered 500": self.broken_by_the_api,
            "in the queue of an API that was killed": environment.forgotten,
            "in the API in the end, by what it gave out then": environment.left,
            "trained": self.outcomes["trained"],
            "skipped, nothing usable in them": self.outcomes["skipped"],
            "waiting in the journal in the end": self.outcomes["received"],
            "cut off in transit": self.cut_off,
            "replaced by garbage in transit": self.replaced,
            "garbage sent in place of a reply to a poll": self.garbage.total(),
            "garbage recorded and set aside": self.outcomes["set_aside"],
            "unreadable, as the trainer counted": self.counters.get("intake_unreadable", 0),
            "polls in doubt": self.doubtful,
            "possibly lost, as the trainer counted": self.counters.get("intake_possibly_lost", 0),
            "groups set aside": self.counters.get("set_aside_groups_total", 0),
            "requests to the API, with faults": _faults(outcome.to_api),
            "requests to the inference server, with faults": _faults(outcome.to_inference),
            "restarts": outcome.restarts,
            "registrations after the first": self.counters.get("intake_re_registrations", 0),
            "publishes": sum(row["kind"] == "publish" for row in self.rows),
            "seconds per step, median": f"{self._step_seconds():.3f}",
            "served in the end": outcome.served,
        }
        for party in ("trainer", "fetcher"):
            for measure in MEASURES:
                steady = self.steadiness(party, measure)
                scale = 1 << 20 if measure in ("memory", "resident") else 1
                rows[f"{party}: {measure}, third and fourth quarter"] = (
                    f"{steady.third / scale:.1f} {steady.fourth / scale:.1f} ({steady.growth:+.2%}), "
                    f"most {steady.most_before / scale:.1f} then {steady.most_after / scale:.1f}"
                )
        print(f"\n{outcome.plan}, {outcome.seconds:.0f} s")  # noqa: T201 - figures
        for name, value in rows.items():
            print(f"  {name:60} {value}")  # noqa: T201

    def _step_seconds(self) -> float:
        seconds = sorted(row["training_seconds"] for row in self.rows if row["kind"] == "step")
        return float(seconds[len(seconds) // 2]) if seconds else float("nan")


def _faults(passages: list[Any]) -> str:
    faults = Counter(passage.fault for passage in passages if passage.fault is not None)
    return f"{len(passages)}, {faults.total()}: {dict(sorted(faults.items()))}"
