"""Probes every party of a run before it starts: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from trainer.check._api import check_api
from trainer.check._inference import check_inference_server
from trainer.check._local import check_model, check_processes, check_start, check_writable, weight_bytes
from trainer.check._publish import check_publish
from trainer.check._result import CheckResult
from trainer.config import TrainerConfig
from trainer.launch import launched_rank
from trainer.run.places import publish_directory

__all__ = ["CheckResult", "run_checks"]

# float32 weights, and two moments of the same size.
_CHECKPOINT_COPIES = 3


def run_checks(config: TrainerConfig, *, publish: bool = False) -> Iterator[CheckResult]:
    """Run all probes that this configuration calls for, one after the other.

    `publish`: also send the unchanged weights to the inference servers.
    """
    yield check_processes(config)
    if launched_rank() != 0:
        return
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report of tensors, which ours names
    results, tokenizer = check_model(config)
    yield from results
    can_start = results[0].status != "failed"
    if can_start:
        start = check_start(config)
        can_start = start.status != "failed"
        yield start
    size = weight_bytes(Path(config.model.path))
    checkpoints = (config.checkpoint.keep + 1) * _CHECKPOINT_COPIES * size
    yield check_writable("output", config.train.output_dir, bytes_needed=checkpoints)
    yield from check_api(config)
    if config.publish.transport != "none":
        directory = publish_directory(config)
        yield check_writable("published weights", directory, bytes_needed=(config.publish.keep + 1) * size)
        for url in config.publish.servers:
            yield from check_inference_server(url, config, tokenizer)
    if publish and can_start:
        yield from check_publish(config)
