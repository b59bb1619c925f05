"""A server in the middle, or one that is not what it should be: what it gets to see and what it can do."""

from __future__ import annotations

import gzip
import json
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from atropos_client import NO_RETRIES, ApiUnreachable, AtroposClient, ConnectionSettings
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.security.certificate import CERTIFICATE, KEY
from tests.security.parties import PARTIES, SECRET, Party, ask_api, check, publish_to
from trainer.publish.engines.connection import MAX_REPLY_BYTES

STATUS = b'{"current_step":0,"queue_size":0}'
EVERY_PATH = ("/status", "/health", "/v1/models")


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


@pytest.fixture
def elsewhere() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


def answer_everything(server: MisbehavingServer, answer: Answer) -> None:
    for path in EVERY_PATH:
        server.script(path, answer)


@PARTIES
def test_a_redirect_to_another_host_is_not_followed(
    party: Party, server: MisbehavingServer, elsewhere: MisbehavingServer
) -> None:
    answer_everything(elsewhere, Answer(body=STATUS))
    answer_everything(server, Answer(status=307, headers={"Location": f"{elsewhere.url}/status"}))
    assert "failed" in party(server.url)
    assert server.seen[0].headers["authorization"] == f"Bearer {SECRET}"
    assert elsewhere.seen == []


@PARTIES
@pytest.mark.parametrize("location", ["http://[::1", "//", "\x7f", "http://" + "a" * 70_000])
def test_a_redirect_to_no_address_is_an_ordinary_failure(
    party: Party, location: str, server: MisbehavingServer
) -> None:
    answer_everything(server, Answer(status=302, headers={"Location": location}))
    said = party(server.url)
    assert "failed" in said
    assert len(said) < 2000


@PARTIES
def test_a_proxy_named_by_the_shell_hears_nothing(
    party: Party,
    server: MisbehavingServer,
    elsewhere: MisbehavingServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, elsewhere.url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    answer_everything(server, Answer(body=STATUS))
    party(server.url)
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {SECRET}"}
    assert elsewhere.seen == []


@PARTIES
@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_server_that_repeats_the_token_does_not_get_it_into_a_message(
    party: Party, status: int, server: MisbehavingServer
) -> None:
    # In front of what is cut off, so that a half of it would be left if it were cut first.
    body = json.dumps({"error": "x" * 290 + f" Bearer {SECRET}"}).encode()
    answer_everything(server, Answer(status=status, body=body))
    said = party(server.url)
    assert "failed" in said
    assert SECRET[:12] not in said


@PARTIES
def test_a_certificate_that_no_authority_vouches_for_is_refused(party: Party, tls_server: str) -> None:
    assert "failed" in party(tls_server)
    assert "CERTIFICATE_VERIFY_FAILED" in party(tls_server)


def test_the_same_server_is_accepted_where_its_authority_is_named(tls_server: str, tmp_path: Path) -> None:
    authority = tmp_path / "authority.pem"
    authority.write_text(CERTIFICATE)
    settings = ConnectionSettings(url=tls_server, ca_file=authority, retries=NO_RETRIES)
    with AtroposClient(settings) as client:
        assert client.status().queue_size == 0
    settings = ConnectionSettings(url=tls_server, retries=NO_RETRIES)
    with AtroposClient(settings) as client, pytest.raises(ApiUnreachable):
        client.status()


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[str]:
    """A server with a certificate of its own making."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(STATUS)))
            self.end_headers()
            self.wfile.write(STATUS)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> tuple[ssl.SSLSocket, object]:
            plain, address = super().get_request()
            try:
                return context.wrap_socket(plain, server_side=True), address
            except OSError:
                plain.close()
                raise

    pair = tmp_path / "pair.pem"
    pair.write_text(KEY + CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def gzip_bomb() -> bytes:
    """64 MiB of zeros in 64 KiB."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()


BOMBS = {
    "gzip": Answer(body=gzip_bomb(), repeat=200, headers={"Content-Encoding": "gzip"}),
    "gzip in gzip": Answer(
        body=gzip.compress(gzip_bomb() * 20),
        headers={"Content-Encoding": "gzip, gzip"},
        announce_length=False,
    ),
    "another compression": Answer(body=b"x", headers={"Content-Encoding": "zstd"}),
    "no end": Answer(body=b" " * (1 << 20), repeat=200),
    "an announced length": Answer(
        raw=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n{}"
    ),
}


@pytest.mark.parametrize("party", [publish_to, check])
@pytest.mark.parametrize("bomb", BOMBS)
def test_an_inference_servers_reply_is_bounded_also_while_it_is_decompressed(
    party: Party, bomb: str, server: MisbehavingServer
) -> None:
    answer_everything(server, BOMBS[bomb])
    tracemalloc.start()
    try:
        said = party(server.url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "failed" in said
    assert "the maximum" in said or "only gzip was asked for" in said
    assert peak < 4 * MAX_REPLY_BYTES


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"data":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"data":[7]}',
        b'{"data":[]}',
        b"7",
        b"\xff\xfe",
        b'{"queue_size":' + b"9" * 5000 + b"}",
    ],
    ids=["open lists", "deep objects", "no model", "nothing", "a number", "no text", "a long number"],
)
@PARTIES
def test_json_that_is_deep_or_of_another_shape_is_an_ordinary_outcome(
    party: Party, body: bytes, server: MisbehavingServer
) -> None:
    answer_everything(server, Answer(body=body))
    said = party(server.url)
    assert "failed" in said or party is publish_to  # which hands on the bytes for others to read
    assert len(said) < 2_000_000


def test_a_header_cannot_be_smuggled_into_a_request(server: MisbehavingServer) -> None:
    with pytest.raises(ValueError, match="cannot stand in an HTTP header") as caught:
        ConnectionSettings(url=server.url, token=f"{SECRET}\r\nX-Evil: 1")
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="cannot stand in an HTTP header"):
        ConnectionSettings(url=server.url, headers={"X-Good": "1\r\nX-Evil: 1"})
    assert "Authorization" not in ask_api(server.url)
    assert all("x-evil" not in seen.headers for seen in server.seen)


HEADERS = {
    "a length of 5,000 digits": b"Content-Length: " + b"9" * 5000,
    "a negative length": b"Content-Length: -1",
    "two lengths": b"Content-Length: 2\r\nContent-Length: 200",
    "a length and chunks": b"Content-Length: 2\r\nTransfer-Encoding: chunked",
    "an escape sequence": b"X-Evil: \x1b[2J",
    "a header without an end": b"X-Evil: " + b"x" * (1 << 20),
}


@PARTIES
@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_make_no_sense_are_an_ordinary_failure(
    party: Party, header: str, server: MisbehavingServer
) -> None:
    head = b"HTTP/1.1 500 No\r\nContent-Type: application/json\r\n"
    answer_everything(server, Answer(raw=head + HEADERS[header] + b"\r\n\r\n{}"))
    said = party(server.url)
    assert "failed" in said
    assert "\x1b" not in said
    assert len(said) < 2000
