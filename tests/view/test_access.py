"""Who may see the page of a run."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from trainer.errors import ConfigurationError
from trainer.monitoring.server import PageRequest
from trainer.view.access import TOKEN_VARIABLE, Access

TOKEN = "a-token-of-enough-characters"  # noqa: S105
BEYOND = "192.0.2.7"


def ask(access: Access, path: str = "/api/state", query: str = "", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = access.refusal(PageRequest(path, query, named))
    return HTTPStatus.OK if reply is None else int(reply.status)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9191", "[::1]:80", "LOCALHOST:1", "127.0.0.2"])
def test_on_loopback_its_own_names_are_answered(host: str) -> None:
    assert ask(Access("127.0.0.1", None), host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:9191", "192.168.1.4", "", "[::2]"])
def test_another_name_that_leads_here_is_refused(host: str) -> None:
    assert ask(Access("127.0.0.1", None), host=host) == 421


def test_what_another_site_asks_for_is_refused_and_a_link_from_there_is_followed() -> None:
    access = Access("::1", None)
    assert ask(access, host="localhost", sec_fetch_site="cross-site") == 403
    assert ask(access, path="/", host="localhost", sec_fetch_site="cross-site") == 200


def test_beyond_loopback_nobody_sees_it_without_a_token() -> None:
    access = Access(BEYOND, None)
    assert not access.is_open
    assert ask(access, host="localhost") == 403


def test_a_token_lets_in_by_any_name_and_is_kept_as_a_cookie() -> None:
    access = Access.of_environment(BEYOND, {TOKEN_VARIABLE: TOKEN})
    assert access.is_open
    assert ask(access, host="node-7:9191") == 401
    assert ask(access, host="node-7:9191", authorization=f"Bearer {TOKEN}") == 200
    assert ask(access, host="node-7:9191", authorization=f"Bearer {TOKEN}x") == 401
    assert ask(access, query=f"token={TOKEN}") == 401  # in the address only of the page itself
    reply = access.refusal(PageRequest("/", f"token={TOKEN}", {}))
    assert reply is not None
    assert reply.status == HTTPStatus.SEE_OTHER
    headers = dict(reply.headers)
    assert headers["Location"] == "/"
    assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    assert TOKEN not in headers["Set-Cookie"]
    assert ask(access, cookie="other=1; " + headers["Set-Cookie"].partition(";")[0]) == 200
    assert ask(access, cookie="atropos_view=") == 401


@pytest.mark.parametrize("token", ["short", "ü" * 20])
def test_a_token_that_can_be_guessed_or_not_sent_is_refused(token: str) -> None:
    with pytest.raises(ConfigurationError, match=TOKEN_VARIABLE):
        Access(BEYOND, token)
