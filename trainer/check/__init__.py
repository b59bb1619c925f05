"""Probes every party of a run before it starts: what is wrong, and what to do about it."""

from trainer.check._api import check_api
from trainer.check._inference import check_inference_server
from trainer.check._local import check_model, check_processes, check_start, check_writable, weight_bytes
from trainer.check._publish import check_publish
from trainer.check._result import CheckResult, CheckStatus

__all__ = [
    "CheckResult",
    "CheckStatus",
    "check_api",
    "check_inference_server",
    "check_model",
    "check_processes",
    "check_publish",
    "check_start",
    "check_writable",
    "weight_bytes",
]
