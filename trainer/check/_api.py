"""The Atropos API and the environments behind it."""

from __future__ import annotations

from atropos_client import AtroposClientError
from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig
from trainer.sources import make_client

_API = "Atropos API"
_ENVIRONMENTS = "environments"


def check_api(config: TrainerConfig) -> list[CheckResult]:
    """Ask the API for its state; changes nothing there, in particular registers nobody."""
    with make_client(config.atropos) as client:
        try:
            status = client.status()
            info = client.info()
        except AtroposClientError as error:
            remedy = f"start it (run-api --port 8000) or set atropos.url, now {config.atropos.url}"
            return [failed(_API, str(error), remedy)]
        found = f"{config.atropos.url} answers, {status.queue_size} groups in its queue"
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
        try:
            client.environment_status(0)
        except AtroposClientError:
            results.append(
                warned(
                    _ENVIRONMENTS,
                    "none has registered",
                    "start them; they wait by themselves until the trainer polls for the first time",
                )
            )
        else:
            results.append(passed(_ENVIRONMENTS, "at least one has registered"))
    return results
