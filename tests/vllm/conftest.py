"""Fixtures of the tests on real vLLM: a tiny model that it can serve, and servers of it.

They run when they are asked for, `pytest tests/vllm`, never with all the others: vLLM takes gigabytes
and every core. Without `.venv-vllm` (`make vllm`) they are skipped, unless REQUIRE_VLLM=1 says that it has to
be there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_stack.models import make_tiny_model
from tests.vllm.launching import VLLM_PYTHON, VllmServer

_HERE = Path(__file__).parent
_MISSING = f"vLLM is not installed: {VLLM_PYTHON} is missing; `make vllm` installs it"

StartVllm = Callable[..., VllmServer]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless the command line names it or something in it."""
    named = (Path(config.invocation_params.dir, str(each).split("::")[0]).resolve() for each in config.args)
    return None if any(path.is_relative_to(_HERE) for path in named) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no vLLM and none is required."""
    skipped = not VLLM_PYTHON.exists() and os.environ.get("REQUIRE_VLLM") != "1"
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.vllm)
            if skipped:
                item.add_marker(pytest.mark.skip(reason=_MISSING))


@pytest.fixture(scope="session")
def vllm_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with attention heads of 32, which vLLM serves; shared: read only."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", head_size=32)


@pytest.fixture(scope="session")
def start_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartVllm]:
    """Start servers that live until the tests end: call it with the arguments of `VllmServer` after `log`."""
    with contextlib.ExitStack() as stack:

        def start(model: Path, **settings: Any) -> VllmServer:
            assert VLLM_PYTHON.exists(), _MISSING
            log = tmp_path_factory.mktemp("vllm") / "vllm.log"
            return stack.enter_context(VllmServer(model, log, **settings))

        yield start


@pytest.fixture(scope="session")
def vllm_server(vllm_model_directory: Path, start_vllm: StartVllm) -> VllmServer:
    """One server for the whole session, with LoRA, without a key: leave its weights as you found them."""
    return start_vllm(vllm_model_directory, lora=True)
