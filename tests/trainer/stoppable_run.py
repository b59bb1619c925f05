"""A run in a process of its own, to be sent signals: `... MODEL OUTPUT KIND [settings]`.

It says on standard output what it is about to do, so that a signal can be sent in the middle of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.trainer.batches import make_bodies, make_body
from trainer import RecordedSource
from trainer.cli._failures import explain
from trainer.cli._logging import configure_logging
from trainer.cli._run import report, train
from trainer.config import TrainerConfig, load_config
from trainer.sources.incoming import EndOfBatches, IncomingBatch

SETTINGS = (
    *("--train.device", "cpu", "--train.mixed_precision", "no", "--optimizer.learning_rate", "1e-3"),
    *("--loss.name", "policy_gradient", "--data.advantage_normalization", "global"),
    *("--data.packing", "padded", "--data.tokens_per_micro_batch", "20"),
    *("--checkpoint.every", "100", "--logging.progress", "false", "--train.mismatch_alarm", "null"),
)


def settings(model: str, output: str, *others: str) -> TrainerConfig:
    """The configuration of such a run."""
    words = ["--model.path", model, "--train.output_dir", output, *SETTINGS, *others]
    return load_config(None, words, environment={})


def long_body() -> bytes:
    """A batch whose step takes many micro-batches, seconds altogether."""
    return make_body(99, groups=150)


def say(what: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def use_up_descriptors() -> None:
    """Open files until the process may open no more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


def bodies_of(kind: str) -> Iterator[bytes]:
    """Two steps, and then what the signal is to meet."""
    yield from make_bodies(2)
    say("now")
    if kind == "long step":
        yield long_body()
    elif kind == "stuck":  # one call into C that takes minutes
        torch.linalg.svd(torch.randn(8000, 8000, dtype=torch.float64))
    elif kind == "frozen":  # one call into C that never lets another thread run
        ctypes.PyDLL(None).sleep(600)
    elif kind == "no descriptors":  # and stuck: it cannot open a file any more
        use_up_descriptors()
        time.sleep(600)
    elif kind == "no signal":  # with train.max_consecutive_skips 1, what every process ends by
        yield make_body(3, scores=[1.0, 1.0, 1.0, 1.0])
    elif kind == "steps":
        for number in range(2, 100_000):
            yield make_body(number)


class NothingComes(RecordedSource):
    """Waits for ever once its batches are used up."""

    def get(self, timeout: float) -> IncomingBatch | None:
        """None, after a while."""
        try:
            return super().get(timeout)
        except EndOfBatches:
            time.sleep(timeout)
            return None


class NotReady(RecordedSource):
    """Its API does not answer."""

    def start(self) -> None:
        """Wait, for longer than any test."""
        say("now")
        time.sleep(600)


SOURCES = {"wait": NothingComes, "no api": NotReady}


def main(model: str, output: str, kind: str, *others: str) -> int:
    """Run until a signal."""
    torch.set_num_threads(1)
    configure_logging("INFO")
    say(f"rank {os.environ.get('RANK', 0)} pid {os.getpid()}")
    config = settings(model, output, "--train.steps", "100000", *others)
    try:
        return report(train(config, source=SOURCES.get(kind, RecordedSource)(bodies_of(kind))), config)
    except Exception as error:  # noqa: BLE001 - as the command line does
        return explain(error, argparse.Namespace(command="run", configuration=config))


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    sys.exit(main(*sys.argv[1:]))
