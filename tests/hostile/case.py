"""What a row of the table is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.atropos_client.test_real_api import RealApi
from tests.trainer.batches import make_group
from trainer import RunSummary

Outcome = Literal["trained", "set aside", "refused", "possibly lost"]
"""trained: as it is, or as what it clearly means. set aside: kept on disk, with a reason. refused: the run
ends with an error that says what to do. possibly lost: counted, and the run goes on."""

Group = dict[str, Any]

NEIGHBOUR = make_group(random.Random(11), size=2, scores=[1.0, 0.0])
"""The good group that shares a batch with bad ones."""

AFTER = [make_group(random.Random(seed), size=2, scores=[0.0, 1.0]) for seed in (12, 13)]
"""The good batch that follows a bad one."""

BASE: Group = {
    "tokens": [[50, 43, 50, 52, 10], [50, 43, 50, 53, 54, 10]],
    "masks": [[-100, -100, -100, 52, 10], [-100, -100, -100, 53, 54, 10]],
    "scores": [1.0, 0.0],
    "inference_logprobs": [[1.0, 1.0, 1.0, -5.0, -6.0], [1.0, 1.0, 1.0, -4.5, -5.5, -6.5]],
    "env_id": 3,
}
"""The group that is made bad: two answers to one prompt of three tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bad input and what must come of it."""

    name: str
    """Unique; the row's name in the documentation."""
    sent: str
    """What is sent, for people."""
    outcome: Outcome
    says: str = ""
    """Pattern that the reason, or the message of the error, must match."""
    errors: tuple[type[Exception], ...] = ()
    """Class of the error of a refusal; two where two deadlines end at the same time."""
    options: Sequence[str] = ()
    """Settings of the run, as on the command line."""
    batch_size: int = 4
    """Sequences in a batch."""
    patience: float = 60.0
    """Seconds that a reply may take; short only where a reply that takes too long is the point."""
    good_part: Sequence[Group] | None = None
    """What of the bad batch must be trained on; None: nothing."""
    after: Sequence[Group] = field(default_factory=lambda: AFTER)
    """The good batch that follows."""

    @property
    def origin(self) -> str:
        """Who sends it."""
        raise NotImplementedError

    def good_bodies(self) -> list[bytes]:
        """The batches of a run that sees only what is good."""
        batches = [self.good_part, self.after] if self.good_part else [self.after]
        return [json.dumps({"batch": list(batch or ())}).encode() for batch in batches]


@dataclass(frozen=True, kw_only=True)
class GroupCase(Case):
    """Bad groups of an environment."""

    groups: Sequence[str]
    """JSON text of each."""
    neighbours: Sequence[Group] = (NEIGHBOUR,)
    """Good groups of the same batch."""
    by_server: bool = False
    """The real API does not let it through, so a server that misbehaves sends it."""

    @property
    def origin(self) -> str:
        """Who sends it."""
        return "server" if self.by_server else "environment"

    def batch_texts(self) -> list[str]:
        """JSON text of every group of the bad batch."""
        return [*self.groups, *map(json.dumps, self.neighbours)]


@dataclass(frozen=True, kw_only=True)
class ReplyCase(Case):
    """Bad replies of a server; a good batch follows."""

    answers: Sequence[Answer] = ()
    """To the first polls."""
    others: dict[str, Answer] = field(default_factory=dict)
    """To other routes, by path without its slash."""
    address: str | None = None
    """Where the run looks for the API instead of at the server's address."""
    measured: bool = False
    """Also run in a process of its own whose memory is watched."""

    @property
    def origin(self) -> str:
        """Who sends it."""
        return "server"


class Train(Protocol):
    """Runs the real loop against the API at `url`; `on_step` hears of every optimizer step."""

    def __call__(self, url: str, *, on_step: Callable[[int], None] = ...) -> RunSummary: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What an episode plays with."""

    api: RealApi
    server: MisbehavingServer
    train: Train


@dataclass(frozen=True, kw_only=True)
class EpisodeCase(Case):
    """Something that happens around a run: `good_part` is trained, then `after`."""

    play: Callable[[Stage], RunSummary]
    by: str
    """Who does it."""
    may_cost_a_poll: bool = False
    """Whether a poll can be under way when it happens, which counts as possibly lost."""

    @property
    def origin(self) -> str:
        """Who sends it."""
        return self.by


def changed(**fields: Any) -> str:
    """JSON text of the base group with other fields; numbers that JSON lacks become NaN and Infinity."""
    return json.dumps({**BASE, **fields})


def without(name: str) -> str:
    """JSON text of the base group without a field."""
    return json.dumps({key: value for key, value in BASE.items() if key != name})


def with_value(name: str, row: int, column: int, value: Any) -> str:
    """JSON text of the base group with another value at one place; a token's mask follows."""
    group = json.loads(json.dumps(BASE))
    group[name][row][column] = value
    if name == "tokens" and group["masks"][row][column] != -100:
        group["masks"][row][column] = value
    return json.dumps(group)


def aside(name: str, sent: str, text: str, says: str, **more: Any) -> GroupCase:
    """A group that is set aside; its neighbour is trained."""
    return GroupCase(
        name=name, sent=sent, outcome="set aside", says=says, groups=[text], good_part=[NEIGHBOUR], **more
    )


def aside_whole(name: str, sent: str, texts: Sequence[str], says: str, **more: Any) -> GroupCase:
    """Groups without anything to train on, alone in their batch, which is set aside."""
    return GroupCase(
        name=name, sent=sent, outcome="set aside", says=says, groups=texts, neighbours=(), **more
    )


def trained(name: str, sent: str, text: str, meant: Group = BASE, **more: Any) -> GroupCase:
    """A group that is odd and trained all the same, as what it clearly means."""
    good_part = [meant, NEIGHBOUR]
    return GroupCase(name=name, sent=sent, outcome="trained", groups=[text], good_part=good_part, **more)


def lost(name: str, sent: str, text: str) -> GroupCase:
    """A group at which the real API answers 500, with the batch already off its queue."""
    return GroupCase(name=name, sent=sent, outcome="possibly lost", says="status 500", groups=[text])


def flat(fields: Group) -> str:
    """The base group with other fields and equal scores."""
    return json.dumps({**BASE, "scores": [0.5, 0.5], **fields})
