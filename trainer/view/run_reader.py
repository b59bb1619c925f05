"""Reads a run's directory for those who look at it: state, curves, batches, groups. Changes nothing there.

One thread uses a reader. Batches that were parsed are kept in small numbers: people look back and forth.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from atropos_client import parse_batch
from atropos_client.errors import InvalidReply, JournalError
from atropos_client.journal import JOURNAL_FILE, Journal, LedgerEntry, Outcome
from schemas import BatchReply
from trainer.errors import CheckpointError
from trainer.view.metric_series import MetricSeries
from trainer.view.recorded_logprobs import RecordedLogprobs
from trainer.view.rollouts import MOST_TOKENS, detail, groups_of, rejected_detail, summarize
from trainer.view.run_advantages import batch_advantages
from trainer.view.set_aside_reasons import SetAsideReasons
from trainer.view.token_text import TokenText, load_token_text

OUTCOMES: Final = ("received", "trained", "set_aside", "skipped")
POINTS: Final = 800
"""Buckets of a curve, if no other number is asked for."""
_MOST_POINTS: Final = 4000
_PARSED_BATCHES: Final = 3
_SUMMARIES: Final = 2000
_READING_SECONDS: Final = 1.0
"""A list of groups ends where reading its batches has taken as long; the next request goes on."""
_CONFIGURATION_SECONDS: Final = 30.0
_DEAD_AFTER: Final = 60.0
_LONGEST_HEALTH: Final = 1 << 20


class NotThere(LookupError):  # noqa: N818 - reads as what was found
    """What was asked for is not in this run; the message says why."""


class RunReader:
    """A run that is looked at.

    Args:
        directory: A run's output directory.
        tokenizer: A directory with the tokenizer of its model. None: find it.
    """

    def __init__(self, directory: Path, *, tokenizer: Path | None = None) -> None:
        self.directory = directory
        """The run's output directory."""
        self.metrics = MetricSeries(directory / "metrics.jsonl")
        """Its rows so far."""
        self._tokenizer = tokenizer
        self._set_aside = SetAsideReasons(directory / "set_aside")
        self._logprobs = RecordedLogprobs(directory)
        self._summaries: OrderedDict[tuple[int, str], list[dict[str, Any]]] = OrderedDict()
        self._parsed: OrderedDict[int, BatchReply] = OrderedDict()
        self._text: TokenText | None = None
        self._text_is_final = False
        self._configuration: dict[str, Any] = {}
        self._configuration_at = -_CONFIGURATION_SECONDS

    @property
    def configuration(self) -> dict[str, Any]:
        """The run's settings, from its newest checkpoint; empty before the first."""
        if time.monotonic() - self._configuration_at >= _CONFIGURATION_SECONDS:
            from trainer.checkpoints.manifest import read_manifest
            from trainer.checkpoints.retention import list_checkpoints

            self._configuration_at = time.monotonic()
            for path in reversed(list_checkpoints(self.directory / "checkpoints")):
                try:
                    self._configuration = read_manifest(path).configuration
                    break
                except CheckpointError:
                    continue
        return self._configuration

    def refresh(self) -> None:
        """Read what the run has written since the last call."""
        self.metrics.read_new()
        self._set_aside.read_new()

    def state(self) -> dict[str, Any]:
        """The run in a few lines: who it is, what it does now, how far it has come."""
        self.refresh()
        health = self._health()
        configuration = self.configuration
        loss, train, publish = (configuration.get(name, {}) for name in ("loss", "train", "publish"))
        return {
            "name": self.directory.absolute().name,
            "position": self.metrics.position,
            "steps": train.get("steps"),
            "model": _last_part((configuration.get("model") or {}).get("path")),
            "loss": loss.get("preset") or loss.get("name"),
            "estimator": configuration.get("data", {}).get("advantage_estimator"),
            "servers": publish.get("servers"),
            "health": health,
            "newest": self.metrics.newest,
            "publish": self.metrics.newest_publish,
            "skipped": self.metrics.skipped[-20:],
            "skipped_count": self.metrics.skipped_count,
            "reasons": dict(self._set_aside.kinds.most_common(12)),
            "batches": self._outcomes(),
            "unreadable_rows": self.metrics.unreadable,
        }

    def _health(self) -> dict[str, Any] | None:
        """What the run last said of itself, with how long ago; None if it never did."""
        try:
            with (self.directory / "health.json").open("rb") as file:
                health = json.loads(file.read(_LONGEST_HEALTH))
            age = max(0.0, time.time() - float(health["time"]))
        except (OSError, ValueError, LookupError, TypeError):
            return None
        gone = health.get("status") != "ended" and age > _DEAD_AFTER
        return {**health, "age_seconds": round(age, 1), "is_gone": gone}

    def _outcomes(self) -> dict[Outcome, int]:
        try:
            with closing(self._journal()) as journal:
                return journal.outcomes()
        except (NotThere, JournalError):
            return {}

    def curves(
        self,
        kind: str,
        names: list[str],
        *,
        first: int | None = None,
        last: int | None = None,
        points: int = POINTS,
    ) -> dict[str, Any]:
        """Sample columns of the rows of a kind; see `Series.sampled`. No names: all columns."""
        self.metrics.read_new()
        if kind not in self.metrics.series:
            raise NotThere(f"there are no rows of kind {kind!r}: step and publish are the kinds")
        series = self.metrics.series[kind]
        if first is not None and last is not None:
            series = self.metrics.window(kind, first, last)
        points = max(2, min(points, _MOST_POINTS))
        sampled = series.sampled(names or list(series.columns), first=first, last=last, points=points)
        return {
            **sampled,
            "position": self.metrics.position,
            "names": sorted(self.metrics.series[kind].columns),
        }

    def batches(
        self, *, before: int | None = None, limit: int = 50, outcome: Outcome | None = None
    ) -> dict[str, Any]:
        """The newest batches before a number, each with short records of its groups.

        Ends early where reading takes long; `next` is what `before` has to be to go on, null at the end.
        """
        self._set_aside.read_new()
        limit = max(1, min(limit, 500))
        ends_at = time.monotonic() + _READING_SECONDS
        found: list[dict[str, Any]] = []
        with closing(self._journal()) as journal:
            entries = journal.newest(limit, before=before, outcome=outcome)
            for entry in entries:
                if found and time.monotonic() > ends_at:
                    break
                found.append(self._batch_record(journal, entry))
        went_on = len(entries) == limit or len(found) < len(entries)
        return {"batches": found, "next": found[-1]["batch"] if found and went_on else None}

    def _batch_record(self, journal: Journal, entry: LedgerEntry) -> dict[str, Any]:
        record: dict[str, Any] = {
            "batch": entry.number,
            "received_at": entry.received_at,
            "served_version": entry.served_version if entry.served_version >= 0 else None,
            "bytes": entry.size,
            "outcome": entry.outcome,
            "step": entry.step,
            "reason": entry.reason or entry.skip_reason,
            "pruned": entry.stored_size is None,
            "groups": [],
        }
        key = (entry.number, entry.outcome)
        if key not in self._summaries and entry.stored_size is not None:
            try:
                reply = self._reply(journal, entry.number)
            except (JournalError, InvalidReply) as error:
                record["unreadable"] = str(error)
                return record
            self._summaries[key] = summarize(reply, self._set_aside.of_batch(entry.number))
            if len(self._summaries) > _SUMMARIES:
                self._summaries.popitem(last=False)
        recorded = self._logprobs.groups(entry.number)
        record["groups"] = [
            {**each, "recorded": each["group"] in recorded} for each in self._summaries.get(key, [])
        ]
        return record

    def group(self, batch: int, place: int, *, most_tokens: int = MOST_TOKENS) -> dict[str, Any]:
        """One group, token by token.

        Raises:
            NotThere: The run has no such group, or its body was pruned.
        """
        self._set_aside.read_new()
        with closing(self._journal()) as journal:
            try:
                entry = journal.entry(batch)
                reply = self._reply(journal, batch)
            except (JournalError, InvalidReply) as error:
                raise NotThere(str(error)) from error
        about = {"batch": batch, "outcome": entry.outcome, "step": entry.step}
        for rejected in reply.rejected:
            if rejected.index == place:
                return {**about, **rejected_detail(rejected)}
        reasons = self._set_aside.of_batch(batch)
        groups = groups_of(reply)
        used = [each for each in groups if each.place not in reasons]
        advantages, note = batch_advantages([each.group for each in used], self.configuration)
        of_place = {each.place: own for each, own in zip(used, advantages or [], strict=False)}
        for each in groups:
            if each.place == place:
                found = detail(
                    each,
                    self.text,
                    advantages=of_place.get(place),
                    recorded=self._logprobs.of_group(batch, place),
                    reason=reasons.get(place),
                    most_tokens=most_tokens,
                )
                return {**about, "advantage_note": note, **found}
        raise NotThere(f"batch {batch} has {len(reply.batch or [])} groups, none at place {place}")

    @property
    def text(self) -> TokenText:
        """Reads tokens of this run."""
        if self._text is None or not (self._text.decodes or self._text_is_final):
            self._text = load_token_text(
                self.directory, self.configuration.get("model") or {}, self._tokenizer
            )
            self._text_is_final = bool(self.configuration)
        return self._text

    def _journal(self) -> Journal:
        for directory in (self.directory / "journal", self.directory):
            if (directory / JOURNAL_FILE).is_file():
                return Journal.read_only(directory)
        raise NotThere(
            "this run keeps no journal: its batches came from recordings, or the directory was copied "
            "without it"
        )

    def _reply(self, journal: Journal, number: int) -> BatchReply:
        reply = self._parsed.get(number)
        if reply is None:
            reply = self._parsed[number] = parse_batch(journal.read(number).body)
            while len(self._parsed) > _PARSED_BATCHES:
                self._parsed.popitem(last=False)
        self._parsed.move_to_end(number)
        return reply


def _last_part(path: Any) -> str | None:
    return str(path).rstrip("/").rpartition("/")[2] if path else None
