"""Whom the training thread waits for, by name; credentials are never part of a name."""

from __future__ import annotations

import httpx

from trainer.config import TrainerConfig


class Parties:
    """The parties of a run, in words that follow "waiting for".

    Args:
        config: The run's configuration.
        source: Who process 0 gets batches from.
        is_main_process: Whether this process is the one that fetches and publishes.
    """

    def __init__(self, config: TrainerConfig, *, source: str, is_main_process: bool) -> None:
        servers = [_plain(url) for url in config.publish.servers]
        noun = "inference server" if len(servers) == 1 else "inference servers"
        self.batches = source if is_main_process else "process 0"
        """Who sends batches."""
        self.servers = f"the {noun} {', '.join(servers)}"
        """Who is published to."""
        self.computation = "the computation"
        """What trains."""
        self.disk = f"the disk of {config.train.output_dir}"
        """What holds checkpoints."""
        self.ending = "the fetching process, the publisher and trackers to end"
        """Who is still at work when training is over."""


def atropos_api(url: str) -> str:
    """The Atropos API at this address."""
    return f"the Atropos API at {_plain(url)}"


def _plain(url: str) -> str:
    return str(httpx.URL(url).copy_with(username=None, password=None)).rstrip("/")
