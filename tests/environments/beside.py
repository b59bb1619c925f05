"""The real API with a program of environments beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.atropos_client.test_real_api import RealApi
from tests.forked import Forked


@contextmanager
def api_and_environments(module: str, *words: str, log: Path) -> Iterator[str]:
    """Run a module with the API's address as its first argument; yields that address.

    The module must outlive the block: what fails otherwise shows the end of the log.
    """
    with RealApi() as api:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = Forked(module, [api.url, *words], stdout=log, environment=environment)
        try:
            yield api.url
            assert process.poll() is None, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
