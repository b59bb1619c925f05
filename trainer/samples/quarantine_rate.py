"""Watches the share of groups set aside over the last batches; it raises an alarm, then ends the run.

One bad group costs a group. A rising share means that an environment is broken, and the run goes on with what
the others send: a different mixture of tasks than the one that was asked for. That must be heard.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from trainer.config import TrainSettings
from trainer.errors import TooManySetAside

logger = logging.getLogger(__name__)

_REASONS_NAMED = 3
_REASONS_KEPT = 8  # of one batch; the others count as one, so that a checkpoint's window stays small
_OTHER_REASONS = "other reasons"
_LONGEST_REASON = 160  # characters of a reason that are looked at and quoted, numbers counted as one each
_LONGEST_QUOTE = 400  # with them: a hostile number has any length
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class KindOfReason:
    """A reason that stands for all of its kind: equal are those that differ in numbers only."""

    kind: str
    """The reason without its numbers."""
    first: str = field(compare=False)
    """A reason as it was given: the first of its kind where kinds are counted."""


class BatchShare(BaseModel):
    """One batch of the window."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: int
    """All groups, those set aside included."""
    reasons: dict[str, int]
    """Groups set aside, by the first reason of each kind."""


class QuarantineWindow(BaseModel):
    """The window, oldest batch first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: tuple[BatchShare, ...] = ()
    quiet_batches: int = 0
    """Batches left until the next warning while the share stays high."""


class QuarantineRate:
    """Watches the share of groups set aside over the last `train.set_aside_window` batches.

    It judges full windows only: in the first few batches one bad group would be a large share.

    Args:
        settings: Section `train` of the configuration.
        state: Of the run that is resumed. None: the window is empty.
    """

    def __init__(self, settings: TrainSettings, state: QuarantineWindow | None = None) -> None:
        self._alarm = settings.set_aside_alarm
        self._limit = settings.set_aside_limit
        self._window: deque[tuple[int, Counter[KindOfReason]]] = deque(maxlen=settings.set_aside_window)
        self._quiet_batches = 0  # left until the next warning while the share stays high
        if state is not None:
            self._window.extend((batch.groups, _count_kinds(batch.reasons)) for batch in state.batches)
            self._quiet_batches = state.quiet_batches

    @property
    def state(self) -> QuarantineWindow:
        """The state with which a resumed run judges as this one would."""
        batches = tuple(
            BatchShare(groups=groups, reasons={kind.first: count for kind, count in found.items()})
            for groups, found in self._window
        )
        return QuarantineWindow(batches=batches, quiet_batches=self._quiet_batches)

    @property
    def share(self) -> float:
        """Groups set aside, of all groups in the window; 0.0 before the first batch."""
        groups = sum(count for count, _ in self._window)
        return sum(reasons.total() for _, reasons in self._window) / groups if groups else 0.0

    def add(self, *, groups: int, reasons: Iterable[str]) -> bool:
        """Take in a batch.

        Args:
            groups: All groups of the batch, those set aside included.
            reasons: Why groups were set aside, one reason a group.

        Returns:
            Whether this batch raised the alarm: a warning that names the share and the most frequent reasons.
            While the share stays high, the alarm is raised again once a window.

        Raises:
            TooManySetAside: The share is past `train.set_aside_limit`.
        """
        self._window.append((groups, _most_frequent(Counter(map(kind_of_reason, reasons)))))
        self._quiet_batches = max(0, self._quiet_batches - 1)
        if len(self._window) < (self._window.maxlen or 1):
            return False
        if self._limit is not None and self.share > self._limit:
            raise TooManySetAside(
                f"{self._summary()}. That is past train.set_aside_limit ({self._limit:g}): mend the "
                "environment that sends these groups, or raise the limit to go on without them"
            )
        if self._alarm is None or self.share <= self._alarm:
            self._quiet_batches = 0
            return False
        if self._quiet_batches:
            return False
        self._quiet_batches = self._window.maxlen or 1
        logger.warning("%s (train.set_aside_alarm %g)", self._summary(), self._alarm)
        return True

    def _summary(self) -> str:
        reasons: Counter[KindOfReason] = Counter()
        for _, of_batch in self._window:
            reasons.update(of_batch)
        groups = sum(count for count, _ in self._window)
        return (
            f"{reasons.total()} of the {groups} groups ({self.share:.0%}) of the last {len(self._window)} "
            f"batches were set aside. The most frequent reasons: {name_reasons(reasons)}"
        )


def _count_kinds(reasons: dict[str, int]) -> Counter[KindOfReason]:
    counts: Counter[KindOfReason] = Counter()
    for reason, count in reasons.items():
        counts[kind_of_reason(reason)] += count
    return counts


def _most_frequent(reasons: Counter[KindOfReason]) -> Counter[KindOfReason]:
    if len(reasons) <= _REASONS_KEPT:
        return reasons
    kept = Counter(dict(reasons.most_common(_REASONS_KEPT)))
    kept[kind_of_reason(_OTHER_REASONS)] = reasons.total() - kept.total()
    return kept


def name_reasons(kinds: Counter[KindOfReason]) -> str:
    """List the most frequent kinds of reasons with their counts, each by its first reason.

    The numbers in it, a position among them, are those of the first group: where it stands for more, it is
    named as an example.
    """
    return "; ".join(
        f"{count} x {'e.g. ' if count > 1 and _NUMBER.search(kind.first) else ''}{kind.first}"
        for kind, count in kinds.most_common(_REASONS_NAMED)
    )


def kind_of_reason(reason: str) -> KindOfReason:
    """Leave a reason's numbers out of comparison, so that equal faults at different places count together."""
    without = _NUMBER.sub("N", reason)
    in_numbers = len(reason) - len(without)
    quoted = reason[: min(_LONGEST_REASON + in_numbers, _LONGEST_QUOTE)]
    return KindOfReason(without[:_LONGEST_REASON], quoted)
