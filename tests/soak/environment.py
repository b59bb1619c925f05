"""Rollouts without end: mostly sound, some hostile, and a few that the API itself breaks on."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import httpx

from atropos_client import AtroposClient, AtroposClientError
from tests.soak.identity import names_of
from tests.trainer.batches import VOCABULARY, make_group

GROUPS_IN_A_BATCH: Final = 2
GROUP_SIZE: Final = 4
BATCHES_AHEAD: Final = 3
"""So many batches wait in the API at most: what a restart of it can cost."""

PUSH_PATIENCE: Final = 60.0

SHARES: Final = {"hostile": 0.02, "one hostile group": 0.03, "not a number": 0.01}
"""Of all batches. The first is skipped, the second trained without a group, the API loses the third."""


@dataclass(frozen=True)
class Statement:
    """What one API said of its batches in the end, next to what it had been sent."""

    pushed: int
    formed: int
    """Batches that it had put together: given away, broken, or about to be."""
    groups_queued: int


class Environment:
    """Keeps the API supplied; called again and again by the one thread that also restarts the API."""

    def __init__(self, url: str, seed: str) -> None:
        self._url = url
        self._generator = random.Random(seed)
        self._client = AtroposClient(url)
        self._waiting = 0
        self._registered = False
        self.pushed: Counter[str] = Counter()
        """Batches by kind."""
        self.groups: Counter[str] = Counter()
        """Names of all groups pushed."""
        self.statements: list[Statement] = []
        """One for each API that took batches."""
        self.left_groups: Counter[str] = Counter()
        """Names of the groups that the last API still held in the end."""
        self.left = 0
        """Batches that it still held, those included that it broke on when asked."""
        self._pushed_here = 0
        self._first_step = 0
        self.forgotten = 0
        """Batches that waited in an API that was killed."""
        self._taken = 0

    def forget(self) -> None:
        """The API was killed: its queue is gone, and it knows no trainer."""
        self.forgotten += self._waiting
        self._waiting = self._pushed_here = 0
        self._registered = False

    @property
    def waiting(self) -> int:
        """Batches that the API should still hold, by what was pushed and taken."""
        return self._waiting

    def hear(self) -> None:
        """Let the API say what it has; before it is killed, and in the end."""
        if self._registered:
            said = self._client.status()
            formed = said.current_step - self._first_step
            self.statements.append(Statement(self._pushed_here, formed, said.queue_size))

    def drain(self) -> None:
        """Take what the API still holds, once the trainer has ended."""
        while True:
            response = httpx.get(f"{self._url}/batch", timeout=PUSH_PATIENCE)
            if response.status_code < 500:
                batch = response.raise_for_status().json()["batch"]
                if not batch:
                    return
                self.left_groups.update(names_of(batch))
            self.left += 1

    def supply(self, taken: int) -> None:
        """Push until enough is ahead; `taken`: batches that the API has given away or broken, in all."""
        self.supply_nothing(taken)
        # Groups that come before the trainer has registered would keep the API from ever taking it.
        if not self._registered and self._trainer_is_there():
            self._registered = True
            self._first_step = self._client.status().current_step  # the trainer's; batches count on from it
        while self._registered and self._waiting < BATCHES_AHEAD:
            self._push()

    def supply_nothing(self, taken: int) -> None:
        """Only note what was taken."""
        self._waiting -= taken - self._taken
        self._taken = taken

    def close(self) -> None:
        self._client.close()

    def _trainer_is_there(self) -> bool:
        try:
            return self._client.info().registered
        except AtroposClientError:
            return False

    def _push(self) -> None:
        draw, kind = self._generator.random(), "sound"
        for name, share in SHARES.items():
            if draw < share:
                kind = name
                break
            draw -= share
        groups = [make_group(self._generator, size=GROUP_SIZE) for _ in range(GROUPS_IN_A_BATCH)]
        if kind == "not a number":
            groups[0]["scores"][0] = float("nan")
        elif kind != "sound":
            for group in groups if kind == "hostile" else groups[:1]:
                self._spoil(group)
        # As Python's json writes it, NaN included.
        response = httpx.post(
            f"{self._url}/scored_data_list",
            content=json.dumps(groups).encode(),
            headers={"Content-Type": "application/json"},
            timeout=PUSH_PATIENCE,
        )
        response.raise_for_status()
        self.pushed[kind] += 1
        self.groups.update(names_of(groups))
        self._pushed_here += 1
        self._waiting += 1

    def _spoil(self, group: dict[str, Any]) -> None:
        match self._generator.randrange(5):
            case 0:
                group["tokens"][0][-1] = group["masks"][0][-1] = VOCABULARY + 1000
            case 1:
                group["masks"][1].pop()
            case 2:
                group["inference_logprobs"][0][-1] = 3.5
            case 3:
                group["masks"] = [[-100] * len(row) for row in group["tokens"]]
            case 4:
                group["tokens"][2][0] = -7
