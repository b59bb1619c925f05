"""One line of `atropos-train check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CheckStatus = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Finding of one probe."""

    name: str
    """The party, e.g. `Atropos API`."""
    status: CheckStatus
    """warning: a run can start, but something is not as it should be by then."""
    found: str
    """The finding."""
    remedy: str | None = None
    """The remedy; None where nothing is to be done."""


def passed(name: str, found: str) -> CheckResult:
    """A probe that found what it should."""
    return CheckResult(name=name, status="ok", found=found)


def warned(name: str, found: str, remedy: str) -> CheckResult:
    """A probe that found something to look at."""
    return CheckResult(name=name, status="warning", found=found, remedy=remedy)


def failed(name: str, found: str, remedy: str) -> CheckResult:
    """A probe that found what would end a run."""
    return CheckResult(name=name, status="failed", found=found, remedy=remedy)
