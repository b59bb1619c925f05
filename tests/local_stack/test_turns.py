"""So many groups for each version of the weights, then wait for the next."""

from __future__ import annotations

import asyncio

import pytest

from local_stack.turns import Turns


class Served:
    version: str | None = "0"

    async def read(self) -> str | None:
        return self.version


async def taken(turns: Turns, wanted: int) -> list[str | None]:
    """Take turns until none is left, or `wanted` are taken."""
    got: list[str | None] = []
    while len(got) < wanted:
        try:
            got.append(await asyncio.wait_for(turns.take(), 0.25))
        except TimeoutError:
            break
    return got


async def test_a_version_has_so_many_turns_and_the_next_has_as_many_again() -> None:
    served = Served()
    turns = Turns(served.read, per_version=2)
    assert await taken(turns, 5) == ["0", "0"]
    served.version = "1"
    assert await taken(turns, 5) == ["1", "1"]


async def test_a_turn_given_back_can_be_taken_again_while_its_version_is_served() -> None:
    served = Served()
    turns = Turns(served.read, per_version=1)
    first = await turns.take()
    turns.give_back(first)
    assert await taken(turns, 5) == ["0"]
    served.version = "1"
    assert await turns.take() == "1"
    turns.give_back(first)
    assert await taken(turns, 5) == []


async def test_a_version_that_stays_too_long_gets_new_turns() -> None:
    turns = Turns(Served().read, per_version=1, patience=0.05)
    assert await taken(turns, 3) == ["0", "0", "0"]


async def test_a_version_of_flat_groups_only_gets_new_turns_at_once() -> None:
    turns = Turns(Served().read, per_version=2)
    for _ in range(2):  # a batch of them, and the next one
        assert await taken(turns, 5) == ["0", "0"]
        turns.note_flat("0")
        assert await taken(turns, 5) == []  # the other group may yet have something to teach
        turns.note_flat("0")
    assert await taken(turns, 5) == ["0", "0"]


async def test_flat_groups_of_another_version_do_not_count() -> None:
    served = Served()
    turns = Turns(served.read, per_version=1)
    await turns.take()
    served.version = "1"
    assert await turns.take() == "1"
    turns.note_flat("0")
    assert await taken(turns, 5) == []


async def test_nobody_waits_for_a_server_that_tells_no_version() -> None:
    served = Served()
    served.version = None
    assert await taken(Turns(served.read, per_version=1), 3) == [None, None, None]


async def test_a_cancelled_wait_lets_others_go_on() -> None:
    served = Served()
    turns = Turns(served.read, per_version=1)
    await turns.take()
    waiting = asyncio.create_task(turns.take())
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    served.version = "1"
    assert await turns.take() == "1"


async def test_weights_that_no_trainer_has_labelled_yet_get_no_turns() -> None:
    served = Served()
    served.version = "default"
    turns = Turns(served.read, per_version=1)
    assert await taken(turns, 1) == []
    served.version = "0"
    assert await taken(turns, 2) == ["0"]
    served.version = "default"  # the server was restarted
    assert await taken(turns, 1) == []
    served.version = "0"  # and got its version again
    assert await taken(turns, 2) == ["0"]
