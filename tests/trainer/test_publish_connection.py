"""The connection to an inference server, seen from the server."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from trainer.publish import PhaseDeadlineExceeded, ServerFailure
from trainer.publish.engines.connection import Deadline, ServerConnection, says_failed
from trainer.publish.errors import Phase


def once(connection: ServerConnection, path: str) -> bytes:
    """Send a step of a transfer, which may not be sent again."""
    return connection.call(f"POST {path}", Phase.LOAD, deadline=Deadline(10.0), once=True)


def test_what_follows_an_error_is_not_sent_into_the_connection_that_the_server_closes_after_it() -> None:
    with MisbehavingServer() as server, closing(ServerConnection(server.url)) as connection:
        server.script("/update_weights", Answer(status=500))
        server.script("/finish_weight_update", Answer(body=b"{}"))
        with pytest.raises(ServerFailure, match=r"load failed.*HTTP 500"):
            once(connection, "/update_weights")
        once(connection, "/finish_weight_update")
        once(connection, "/finish_weight_update")  # and not into one that has been idle for too long
    assert len({seen.client_port for seen in server.seen}) == 3


def test_a_reply_that_trickles_in_does_not_outlive_the_deadline() -> None:
    with MisbehavingServer() as server, closing(ServerConnection(server.url)) as connection:
        server.script("/v1/completions", Answer(body=b"x" * 10_000, drip=0.05))
        with pytest.raises(PhaseDeadlineExceeded, match=r"0\.5 s"):
            connection.call("POST /v1/completions", Phase.VERIFY, deadline=Deadline(0.5))


@pytest.mark.parametrize(
    ("content", "failed"),
    [
        (b"", False),
        (b"ok", False),
        (b"[1, 2]", False),
        (b'{"status": "paused"}', False),
        (b'{"success": true}', False),
        (b'{"success": false, "message": "no such file"}', True),
        (b'{"error": {"message": "boom"}}', True),
        (b'{"error": null}', False),
        (b'{"object": "error", "message": "boom"}', True),
    ],
)
def test_a_reply_with_status_200_can_still_say_that_it_failed(content: bytes, failed: bool) -> None:
    assert says_failed(content) is failed
