"""A trainer stripped to its intake: takes batches, "trains", and writes its checkpoint; made to be killed.

Started with one JSON argument: journal, settings, checkpoint, train_seconds. The checkpoint is a file with
the number of the last batch that counts, written atomically at every second batch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from atropos_client.fetcher import Fetcher, FetcherSettings
from atropos_client.journal import Journal


def main() -> None:
    logging.basicConfig(level="INFO")
    told = json.loads(sys.argv[1])
    settings = FetcherSettings.model_validate(told["settings"])
    checkpoint = Path(told["checkpoint"])
    after = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    with (
        Journal.open(Path(told["journal"]), wait=settings.farewell + 30) as journal,
        Fetcher(journal, settings, after=after, served_version=lambda: 5) as fetcher,
    ):
        while True:
            batch = fetcher.get(timeout=1)
            if batch is None:
                continue
            time.sleep(told["train_seconds"])
            journal.settle(batch.number, "trained", step=batch.number)
            if batch.number % 2 == 0:
                fresh = checkpoint.with_suffix(".new")
                fresh.write_text(str(batch.number))
                os.replace(fresh, checkpoint)  # noqa: PTH105 - what a checkpoint does


if __name__ == "__main__":
    main()
