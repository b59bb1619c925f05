"""The health check of containers, which the launcher asks too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from local_stack.health import answers, main
from tests.conftest import RunningInferenceServer


def test_a_service_answers_or_does_not(
    shared_inference_server: RunningInferenceServer, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")  # is not asked
    assert answers(f"{shared_inference_server.url}/health")
    assert not answers(f"{shared_inference_server.url}/no-such-page")
    assert not answers(f"http://127.0.0.1:{free_port}/health")


@pytest.mark.parametrize(("name", "status"), [("there", 0), ("not-there", 1)])
def test_the_exit_status_says_whether_all_is_there(
    shared_inference_server: RunningInferenceServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    status: int,
) -> None:
    (tmp_path / "there").touch()
    words = [f"{shared_inference_server.url}/health", "--path", str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", ["health", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == status
