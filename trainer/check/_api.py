"""The Atropos API and the environments behind it."""

from __future__ import annotations

import httpx

from atropos_client import AtroposClient, AtroposClientError, ask_environments, why_no_batch_is_full
from schemas import count_of
from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig
from trainer.sources.live import make_client

_API = "Atropos API"
_ENVIRONMENTS = "environments"


def check_api(config: TrainerConfig) -> list[CheckResult]:
    """Ask the API for its state; changes nothing there, in particular registers nobody."""
    with make_client(config) as client:
        try:
            status = client.status()
            info = client.info()
        except AtroposClientError as error:
            port = httpx.URL(config.atropos.url).port or 80
            remedy = f"start it (run-api --port {port}) or correct atropos.url"
            return [failed(_API, str(error), remedy)]
        found = f"{config.atropos.url} answers, {count_of(status.queue_size, 'group')} in its queue"
        results = [passed(_API, found)]
        if info.batch_size not in (-1, config.atropos.batch_size):
            results.append(
                warned(
                    "registration",
                    f"another trainer registered batch_size {info.batch_size}, "
                    f"this one has {config.atropos.batch_size}; the API keeps the first",
                    "restart the API, or set atropos.batch_size to what it has",
                )
            )
        return results + _check_environments(
            client, info.batch_size if info.registered else config.atropos.batch_size
        )


def _check_environments(client: AtroposClient, batch_size: int) -> list[CheckResult]:
    environments = ask_environments(client)
    if environments is None or environments.registered == 0:
        remedy = "start them; they wait by themselves until the trainer polls for the first time"
        return [warned(_ENVIRONMENTS, "none has registered", remedy)]
    latest = environments.latest_group
    never_full = why_no_batch_is_full(batch_size, latest or 1, environments.largest_group)
    if never_full is not None:
        found, _, remedy = never_full.partition(": ")
        return [failed(_ENVIRONMENTS, found, remedy)]
    found = f"{environments.registered} registered"
    if latest is None:
        remedy = "look at their logs if that stays so; docs/environments.md says what they drop"
        return [warned(_ENVIRONMENTS, f"{found}, none has sent a group yet", remedy)]
    return [passed(_ENVIRONMENTS, f"{found}, the latest group has {count_of(latest, 'sequence')}")]
