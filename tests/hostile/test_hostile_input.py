"""The table of bad inputs, each through the real client, a few of each kind through the training loop too.

A bad input comes first and a good batch follows. Unless the run is refused, the final weights, or what is
prepared for the steps, must equal, bit for bit, those of a run that saw the good parts only: nothing bad was
trained on, and nothing good was missed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.atropos_client.test_real_api import RealApi
from tests.hostile.case import Case, EpisodeCase, GroupCase, ReplyCase, Stage
from tests.hostile.conftest import Check
from tests.hostile.episodes import register
from tests.hostile.harness import push, script_api
from tests.hostile.page import page
from tests.hostile.table import ALL_CASES, API_TAKES, EPISODE_CASES, GROUP_CASES, REPLY_CASES

pytestmark = pytest.mark.slow


def name_of(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", [case for case in GROUP_CASES if not case.by_server], ids=name_of)
def test_what_an_environment_sends(case: GroupCase, hostile_api: RealApi, check: Check) -> None:
    register(hostile_api.url, case.batch_size)
    # Of batches formed in one call the API serves the last one first.
    assert push(hostile_api.url, [json.dumps(group) for group in case.after]).status_code == 200
    assert push(hostile_api.url, case.batch_texts()).status_code == 200
    check(case, hostile_api.url)


@pytest.mark.parametrize("case", [case for case in GROUP_CASES if case.by_server], ids=name_of)
def test_what_only_a_server_can_send(
    case: GroupCase, hostile_server: MisbehavingServer, check: Check
) -> None:
    bad = Answer(body=f'{{"batch": [{", ".join(case.batch_texts())}]}}'.encode())
    script_api(hostile_server, [bad, Answer(body=case.good_bodies()[-1])])
    check(case, hostile_server.url)


@pytest.mark.parametrize("case", REPLY_CASES, ids=name_of)
def test_what_a_server_replies(case: ReplyCase, hostile_server: MisbehavingServer, check: Check) -> None:
    script_api(hostile_server, [*case.answers, Answer(body=case.good_bodies()[-1])], **case.others)
    check(case, case.address or hostile_server.url)


@pytest.mark.parametrize("case", EPISODE_CASES, ids=name_of)
def test_what_happens_around_a_run(
    case: EpisodeCase, hostile_api: RealApi, hostile_server: MisbehavingServer, check: Check
) -> None:
    check(
        case,
        hostile_api.url,
        lambda train: case.play(Stage(api=hostile_api, server=hostile_server, train=train)),
    )


def test_the_real_api_refuses_what_the_table_lets_only_a_server_send(hostile_api: RealApi) -> None:
    register(hostile_api.url, 4)
    through = {case.name.removesuffix(", through the API") for case in GROUP_CASES if not case.by_server}
    for case in GROUP_CASES:
        if case.by_server and case.name not in through | API_TAKES:
            assert push(hostile_api.url, case.groups).status_code >= 400, case.name


def test_every_row_has_a_name_of_its_own_and_says_what_it_must() -> None:
    assert len(ALL_CASES) >= 60
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES)
    for case in ALL_CASES:
        assert case.says or case.outcome == "trained", case.name
        assert bool(case.errors) == (case.outcome == "refused"), case.name


def test_the_page_is_up_to_date() -> None:
    written = Path(__file__).resolve().parents[2] / "docs/hostile-input.md"
    assert written.read_text() == page(), "run: python -m tests.hostile.page > docs/hostile-input.md"
