"""A trainer stripped to its intake: takes batches and "trains" on them; made to be killed.

Started with two arguments: the journal's directory, and the settings as JSON.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from atropos_client.fetcher import Fetcher, FetcherSettings
from atropos_client.journal import Journal


def main() -> None:
    logging.basicConfig(level="INFO")
    settings = FetcherSettings.model_validate_json(sys.argv[2])
    with (
        Journal.open(Path(sys.argv[1]), wait=settings.farewell + 30) as journal,
        Fetcher(journal, settings, after=0, served_version=lambda: 5) as fetcher,
    ):
        while (batch := fetcher.get()) is not None:
            journal.settle(batch.number, "trained", step=batch.number)


if __name__ == "__main__":
    main()
