"""The connection to an inference server, seen from the server."""

from __future__ import annotations

import pytest

from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from trainer.publish import LoadFailed
from trainer.publish._http import Deadline, ServerConnection
from trainer.publish._retry import Repeatability
from trainer.publish.errors import Phase


def once(connection: ServerConnection, path: str) -> bytes:
    """Send a step of a transfer, which may not be sent again."""
    return connection.call(
        "POST",
        path,
        phase=Phase.LOAD,
        version=1,
        deadline=Deadline(10.0),
        repeatability=Repeatability.ONCE,
    )


def test_what_follows_an_error_is_not_sent_into_the_connection_that_the_server_closes_after_it() -> None:
    with MisbehavingServer() as server, ServerConnection(server.url) as connection:
        server.script("/update_weights", Answer(status=500))
        server.script("/finish_weight_update", Answer(body=b"{}"))
        with pytest.raises(LoadFailed, match="HTTP 500"):
            once(connection, "/update_weights")
        once(connection, "/finish_weight_update")
        once(connection, "/finish_weight_update")  # and not into one that has been idle for too long
    assert len({seen.client_port for seen in server.seen}) == 3
