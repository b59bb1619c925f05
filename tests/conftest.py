"""Fixtures for every test: a tiny model on disk and a free port."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from local_stack.models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer (259 tokens); shared, so do not write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
