"""Which requests to an inference server are sent again."""

from __future__ import annotations

import pytest

from trainer.publish._http import says_failed
from trainer.publish._retry import MAX_ATTEMPTS, MAX_WAIT, Fault, Repeatability, may_retry, wait_before

STARTUP, IDEMPOTENT, ONCE = Repeatability.STARTUP, Repeatability.IDEMPOTENT, Repeatability.ONCE


@pytest.mark.parametrize(
    ("fault", "repeatability", "attempt", "again"),
    [
        (Fault.NOT_CONNECTED, STARTUP, 1000, True),
        (Fault.NOT_CONNECTED, IDEMPOTENT, 1, True),
        (Fault.NOT_CONNECTED, IDEMPOTENT, MAX_ATTEMPTS, False),
        (Fault.NOT_CONNECTED, ONCE, 1, True),  # it was never sent
        (Fault.NOT_CONNECTED, ONCE, MAX_ATTEMPTS, False),
        (503, STARTUP, 1000, True),
        (503, IDEMPOTENT, 1, True),
        (503, IDEMPOTENT, MAX_ATTEMPTS, False),
        (503, ONCE, 1, False),
        (502, STARTUP, 1000, True),  # a proxy whose server is still starting
        (504, STARTUP, 1000, True),
        (502, IDEMPOTENT, 1, True),
        (502, IDEMPOTENT, MAX_ATTEMPTS, False),
        (502, ONCE, 1, False),
        (Fault.CONNECTION_LOST, STARTUP, 1, True),
        (Fault.CONNECTION_LOST, IDEMPOTENT, 1, True),
        (Fault.CONNECTION_LOST, ONCE, 1, False),
        (500, STARTUP, 1, False),
        (500, IDEMPOTENT, 1, False),
        (404, STARTUP, 1, False),
        (401, IDEMPOTENT, 1, False),
        (Fault.REFUSED, IDEMPOTENT, 1, False),
        (Fault.TIMED_OUT, STARTUP, 1, False),
        (Fault.TIMED_OUT, IDEMPOTENT, 1, False),
    ],
)
def test_a_request_is_sent_again_only_where_that_helps_and_does_no_harm(
    fault: Fault | int, repeatability: Repeatability, attempt: int, again: bool
) -> None:
    assert may_retry(fault, repeatability, attempt) is again


def test_waits_grow_and_stay_bounded() -> None:
    waits = [wait_before(attempt) for attempt in range(1, 2000)]
    assert waits == sorted(waits)
    assert waits[0] == 0.2
    assert waits[-1] == MAX_WAIT


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
