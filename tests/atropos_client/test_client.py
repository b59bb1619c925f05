"""The client over a real HTTP server that misbehaves on demand; replies that are bad: `tests/hostile`."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from atropos_client import (
    NO_RETRIES,
    AccessDenied,
    ApiUnreachable,
    AtroposClient,
    BatchPossiblyLost,
    ConnectionLost,
    ConnectionSettings,
    ErrorStatus,
    InvalidReply,
    ReplyTimeout,
    ServerError,
    Timeouts,
)
from tests.atropos_client.conftest import Ask
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, zipped
from tests.ports import free_port
from tests.schemas.test_group import GOOD

BATCH = json.dumps({"batch": [GOOD]}).encode()
STATUS = Answer(body=b'{"current_step":3,"queue_size":2}')
TIGER = "tiger-token"
LION = "lion-header"
IMPATIENT = Timeouts(connect=2.0, read=0.2, batch_read=0.2, total=5.0)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (Answer(status=500, body=b"Internal Server Error"), ServerError),
        (Answer(body=BATCH, cut_at=40), ConnectionLost),
        (Answer(body=BATCH, delay=30.0), ReplyTimeout),
        (Answer(body=BATCH, content_type="text/html"), InvalidReply),
    ],
)
def test_whatever_spoils_a_batch_is_a_possible_loss_and_never_repeated(
    ask: Ask, server: MisbehavingServer, answer: Answer, cause: type[Exception]
) -> None:
    server.script("/batch", answer, Answer(body=BATCH))
    with pytest.raises(BatchPossiblyLost, match="possibly lost") as caught:
        ask(server.url, "fetch_batch", timeouts=IMPATIENT)
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.url == f"{server.url}/batch"
    assert server.paths("/batch") == ["/batch"]


@pytest.mark.parametrize(("status", "kind"), [(401, AccessDenied), (403, AccessDenied), (404, ErrorStatus)])
def test_a_poll_that_was_turned_away_is_no_loss(
    ask: Ask, server: MisbehavingServer, status: int, kind: type[ErrorStatus]
) -> None:
    server.script("/batch", Answer(status=status, body=b"go away"))
    with pytest.raises(kind, match="go away") as caught:
        ask(server.url, "fetch_batch")
    assert caught.value.status_code == status


def test_a_batch_that_was_never_asked_for_is_no_loss(ask: Ask) -> None:
    with pytest.raises(ApiUnreachable, match="run-api"):
        ask(f"http://127.0.0.1:{free_port()}", "fetch_batch")


def test_a_gzip_reply_of_exactly_the_maximum_is_read(ask: Ask, server: MisbehavingServer) -> None:
    body = b'{"batch":null' + b" " * 5_000 + b"}"
    server.script("/batch", zipped(body))
    assert ask(server.url, "fetch_batch", max_body_bytes=len(body)) == body
    with pytest.raises(BatchPossiblyLost):
        ask(server.url, "fetch_batch", max_body_bytes=len(body) - 1)


@pytest.mark.parametrize("answer", [Answer(status=503), Answer(hang_up=True), Answer(status=429)])
def test_a_read_is_repeated_after_a_passing_failure(
    ask: Ask, server: MisbehavingServer, answer: Answer
) -> None:
    server.script("/status", answer, answer, STATUS)
    assert ask(server.url, "status").queue_size == 2
    assert len(server.paths("/status")) == 3


def test_repeating_ends_with_the_last_error(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/status", Answer(status=503), Answer(status=502), Answer(status=504, body=b"last"))
    with pytest.raises(ServerError, match=r"504.*last"):
        ask(server.url, "status")
    assert len(server.paths("/status")) == 3


def test_no_retries_means_one_sending(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/status", Answer(status=503), STATUS)
    with pytest.raises(ServerError):
        ask(server.url, "status", retries=NO_RETRIES)


def test_a_redirect_is_refused_and_its_query_not_shown(ask: Ask, server: MisbehavingServer) -> None:
    with MisbehavingServer() as other:
        other.script("/status", STATUS)
        server.script(
            "/status", Answer(status=307, headers={"Location": f"{other.url}/status?secret=hunter2"})
        )
        with pytest.raises(ErrorStatus, match="redirects are not followed") as caught:
            ask(server.url, "status", token=TIGER)
        assert other.seen == []
    assert other.url in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_token_and_headers_reach_the_server_and_nothing_else(
    ask: Ask, server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    options: dict[str, Any] = {"token": TIGER, "headers": {"X-Team": LION}}
    echo = b"you sent Bearer tiger-token and lion-header"
    server.script("/status", STATUS, Answer(status=401, body=echo))
    assert ask(server.url, "status", **options).current_step == 3
    with pytest.raises(AccessDenied) as caught:
        ask(server.url, "status", **options)
    assert server.seen[0].headers["authorization"] == f"Bearer {TIGER}"
    assert server.seen[0].headers["x-team"] == LION
    with AtroposClient(ConnectionSettings(url=server.url, **options)) as client:
        texts = [caplog.text, str(caught.value), repr(caught.value), repr(client), repr(vars(client))]
    assert not [text for text in texts if TIGER in text or LION in text]


@pytest.mark.parametrize("ending", ["\nX: y", "\x00", "é", " \r"])
def test_an_illegal_secret_is_refused_without_showing_it(ending: str) -> None:
    secret = TIGER + ending
    cases: list[dict[str, Any]] = [{"token": secret}, {"headers": {"X-Team": secret}}]
    for options in cases:
        with pytest.raises(ValueError, match="cannot stand in an HTTP header") as caught:
            ConnectionSettings(url="http://127.0.0.1:1", **options)
        assert TIGER not in repr(caught.value)


@pytest.mark.parametrize(
    "address", ["http://user:pw@host:1", "ftp://host", "host:8000", "http://", "http://h/?a=1", "http://h/#x"]
)
def test_an_address_that_makes_no_sense_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(ValueError, match="address of the API") as caught:
        AtroposClient(address)
    assert "pw" not in str(caught.value)


def test_credentials_over_plain_http_to_another_host_are_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    AtroposClient(ConnectionSettings(url="http://api.example:8000", token=TIGER)).close()
    assert "unencrypted" in caplog.text
    caplog.clear()
    AtroposClient(ConnectionSettings(url="http://127.0.0.1:8000", token=TIGER)).close()
    assert caplog.text == ""


def test_a_path_prefix_is_kept(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/team/a/status", STATUS)
    assert ask(f"{server.url}/team/a/", "status").current_step == 3


def test_waiting_until_ready_outlasts_a_starting_server(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/", Answer(status=503), Answer(hang_up=True), Answer())
    ask(server.url, "wait_until_ready", 20.0)
    assert len(server.paths("/")) == 3


def test_waiting_until_ready_ends_at_its_deadline_and_says_why(ask: Ask) -> None:
    with pytest.raises(ApiUnreachable, match=r"not ready within 0\.3 s: .*cannot connect"):
        ask(f"http://127.0.0.1:{free_port()}", "wait_until_ready", 0.3)


def test_waiting_does_not_mend_a_refused_token(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/", Answer(status=401))
    with pytest.raises(AccessDenied):
        ask(server.url, "wait_until_ready", 20.0)


def test_no_latest_example_is_none(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/latest_example", Answer(body=b'{"tokens":[],"masks":[],"scores":[]}'))
    assert ask(server.url, "latest_example") is None


def test_each_request_has_a_connection_of_its_own(server: MisbehavingServer) -> None:
    # A kept one may be closing: what is sent into it gets no answer, as if a batch had been lost.
    server.script("/status", STATUS, Answer(status=503, body=b"x" * 10), STATUS)
    with AtroposClient(server.url) as client:
        for _ in range(3):
            client.status()
    assert len({seen.client_port for seen in server.seen}) == len(server.seen) == 4  # one is a retry


def test_a_compressed_error_page_is_still_a_server_error(ask: Ask, server: MisbehavingServer) -> None:
    server.script("/status", zipped(b"the proxy is sorry " * 20_000, status=500))
    with pytest.raises(ServerError, match="the proxy is sorry"):
        ask(server.url, "status")
