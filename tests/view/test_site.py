"""What the server of the page answers, and what it never does with a request."""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.test_architecture import ROOT
from tests.view.made_run import make_run
from trainer.cli import main
from trainer.monitoring.server import HealthServer
from trainer.view.access import Access
from trainer.view.run_reader import RunReader
from trainer.view.site import SCRIPTS, RunSite, read_asset
from trainer.view.worker import GuardedSite, ViewWorker

VENDOR = ROOT / "trainer/view/page/vendor"
CHECKSUMS = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
"""Of uPlot 1.6.32 as it is published."""


@contextmanager
def served(*runs: Path) -> Iterator[HealthServer]:
    """The page of runs, on a real socket."""
    site = GuardedSite(Access("127.0.0.1", None), RunSite([RunReader(run) for run in runs]).answer)
    with HealthServer("127.0.0.1", 0, {}, site=site) as server:
        yield server


def get(server: HealthServer, target: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("GET", target, headers=headers)
        reply = connection.getresponse()
        return reply, reply.read()


def get_json(server: HealthServer, target: str) -> Any:
    reply, body = get(server, target)
    assert reply.status == 200, body
    return json.loads(body)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("site") / "run")


def test_the_page_and_its_files_are_served_under_a_policy_without_inline_scripts(run: Path) -> None:
    with served(run) as server:
        for target in ("/", "/assets/page.js", "/assets/page.css"):
            reply, body = get(server, target)
            assert reply.status == 200
            assert body
            policy = reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
    page = read_asset("index.html")
    assert "<script>" not in page
    assert "style=" not in page


def test_scripts_make_no_markup_of_texts() -> None:
    for name in SCRIPTS:
        if "vendor" not in name:
            source = read_asset(name)
            for word in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "Function(",
            ):
                assert word not in source, f"{name}: {word}"


def test_the_chart_library_is_the_published_one_with_its_licence() -> None:
    for name, checksum in CHECKSUMS.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == checksum
    assert "MIT" in (VENDOR / "uPlot.LICENSE").read_text()


@pytest.mark.parametrize(
    "target",
    [
        "/assets/../site.py",
        "/assets/%2e%2e/site.py",
        "/assets//etc/passwd",
        "/../../etc/passwd",
        "/assets/vendor/uPlot.LICENSE",
        "/metrics.jsonl",
        "/api/state/",
        "//api/state",
    ],
)
def test_a_path_is_never_the_name_of_a_file(run: Path, target: str) -> None:
    with served(run) as server:
        reply, body = get(server, target)
    assert reply.status == 404
    assert json.loads(body) == {"error": "there is no such page"}


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        ("/api/group?batch=x", 400, "batch must be a whole number"),
        ("/api/group?batch=-1", 400, "batch must be a whole number"),
        ("/api/group?batch=" + "9" * 400, 400, "batch must be a whole number"),
        ("/api/group?batch=77&group=0", 404, "has no batch 77"),
        ("/api/batches?outcome=';DROP", 400, "outcome must be one of"),
        ("/api/curves?kind=secret", 404, "no rows of kind 'secret'"),
        ("/api/state?run=1", 404, "the number of runs here is 1"),
        ("/api/state?" + "a=1&" * 40, 400, "fields"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(run: Path, target: str, status: int, said: str) -> None:
    with served(run) as server:
        reply, body = get(server, target)
    assert reply.status == status
    assert said in json.loads(body)["error"]


def test_another_name_that_leads_here_and_other_methods_are_refused(run: Path) -> None:
    with served(run) as server:
        assert get(server, "/", Host="evil.example")[0].status == 421
        with closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as connection:
            connection.request("POST", "/api/state", body=b"{}")
            assert connection.getresponse().status == 405


def test_curves_are_sent_again_only_when_there_is_something_new(run: Path) -> None:
    with served(run) as server:
        curves = get_json(server, "/api/curves?columns=reward_mean&points=100")
        assert curves["steps"] == [1, 2, 3, 4, 5]
        assert list(curves["columns"]) == ["reward_mean"]
        again = get_json(server, f"/api/curves?columns=reward_mean&known={curves['position']}")
        assert again == {"unchanged": True, "position": curves["position"]}


def test_two_runs_are_drawn_over_one_another(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", steps=2)
    with served(run, other) as server:
        assert get_json(server, "/api/state")["runs"] == ["run", "other"]
        assert get_json(server, "/api/curves?run=1")["steps"] == [1, 2]


def test_the_process_that_serves_for_a_trainer_answers_and_is_started_again(run: Path) -> None:
    with closing(ViewWorker(run)) as worker:
        first = worker.answer("/api/state", "")
        assert json.loads(first.body)["live"] is True
        assert worker.answer("/", "").headers == first.headers
        assert worker.answer("/api/group", "batch=99").status == 404
        process = worker._process
        assert process is not None
        process.kill()
        process.wait()
        assert json.loads(worker.answer("/api/state", "").body)["name"] == "run"
        second = worker._process
        assert second is not None
    assert second.returncode is not None


def test_the_process_ends_with_the_trainer(run: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from trainer.view.worker import ViewWorker; "
        "w = ViewWorker(Path(sys.argv[1])); w.answer('/api/state', ''); print(w._process.pid, flush=True)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    pid = int(ended.stdout)
    deadline = 600
    while (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    ):
        deadline -= 1
        assert deadline, "it goes on without its trainer"
        subprocess.run(["sleep", "0.05"], check=True)


def test_what_is_no_run_and_an_address_beyond_loopback_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATROPOS_VIEW_TOKEN", raising=False)
    assert main(["view", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["view", str(tmp_path / "nowhere")]) == 2
    assert "is no directory" in capsys.readouterr().err
    assert main(["view", str(run), "--host", "192.0.2.7"]) == 2
    assert "set the environment variable ATROPOS_VIEW_TOKEN" in capsys.readouterr().err
