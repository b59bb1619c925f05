"""Rows of the table: replies that the real API does not give on demand."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any

from atropos_client import AccessDenied, ApiUnreachable, BatchPossiblyLost, ErrorStatus, ServerError
from tests.atropos_client.misbehaving_server import Answer, zipped
from tests.hostile.case import NEIGHBOUR, ReplyCase, changed
from tests.ports import free_port
from trainer.errors import DeadlineExceeded

GOOD = json.dumps({"batch": [NEIGHBOUR]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
QUICK_PATIENCE = ("--atropos.batch_timeout", "1", "--atropos.ready_timeout", "1")


def lost(name: str, sent: str, answer: Answer | bytes, says: str, **more: Any) -> ReplyCase:
    """A reply in whose place a batch may have been; the next one is trained."""
    answers = [answer if isinstance(answer, Answer) else Answer(body=answer)]
    return ReplyCase(name=name, sent=sent, outcome="possibly lost", says=says, answers=answers, **more)


def unreadable(name: str, sent: str, body: bytes, says: str, **more: Any) -> ReplyCase:
    """A whole body that is no batch at all: set aside as it came; the next one is trained."""
    return ReplyCase(
        name=name, sent=sent, outcome="set aside", says=says, answers=[Answer(body=body)], **more
    )


def aside(name: str, sent: str, images: str | bytes, says: str, **more: Any) -> ReplyCase:
    """A group that no JSON reader takes, beside a good one, which is trained."""
    text = images.encode() if isinstance(images, str) else images
    body = b'{"batch": [' + changed()[:-1].encode() + b', "images": ' + text + b"}, " + GOOD[11:]
    return ReplyCase(
        name=name,
        sent=sent,
        outcome="set aside",
        says=says,
        answers=[Answer(body=body)],
        good_part=[NEIGHBOUR],
        **more,
    )


def harmless(name: str, sent: str, *answers: Answer, **more: Any) -> ReplyCase:
    """Replies that cost nothing; the batch that follows is trained and none is counted as lost."""
    return ReplyCase(name=name, sent=sent, outcome="trained", answers=answers, **more)


def refused(
    name: str,
    sent: str,
    error: type[Exception] | tuple[type[Exception], ...],
    says: str,
    answers: Sequence[Answer] = (),
    **more: Any,
) -> ReplyCase:
    """What waiting does not mend."""
    return ReplyCase(
        name=name,
        sent=sent,
        outcome="refused",
        errors=error if isinstance(error, tuple) else (error,),
        says=says,
        answers=answers,
        **more,
    )


def arrived(name: str, sent: str, answer: Answer) -> ReplyCase:
    """A good batch in an unusual wrapping."""
    return ReplyCase(name=name, sent=sent, outcome="trained", answers=[answer], good_part=[NEIGHBOUR])


def raw(data: bytes, **more: Any) -> Answer:
    return Answer(raw=data, **more)


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + end)


def bomb(mebibytes: int) -> bytes:
    """One gzip member of zeros, made without holding them."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(mebibytes)) + squeeze.flush()


def gzipped(body: bytes) -> Answer:
    return Answer(body=body, headers={"Content-Encoding": "gzip"})


DEEP = "[" * 100_000 + "]" * 100_000

BODIES = [
    lost("an empty body", "200 without a byte", b"", "the reply is empty"),
    unreadable("half a body", "JSON that ends in the middle", GOOD[: len(GOOD) // 2], "Invalid JSON: EOF"),
    unreadable("a page in place of JSON", "<html> labelled as JSON", b"<html>oops</html>", "Invalid JSON"),
    unreadable("a number in place of a batch", "7", b"7", "is no BatchReply"),
    unreadable("a list in place of a batch", "[]", b"[]", "is no BatchReply"),
    unreadable("an object without a batch", "{}", b"{}", "batch: Field required"),
    unreadable(
        "text as a batch", '{"batch": "x"}', b'{"batch": "x"}', "batch: Input should be a valid array"
    ),
    unreadable(
        "an object as a batch", '{"batch": {}}', b'{"batch": {}}', "batch: Input should be a valid array"
    ),
    unreadable("two replies in one body", "a batch, then another", GOOD + GOOD, "trailing characters"),
    aside("invalid UTF-8", "bytes FF FE inside a text", b'"\xff\xfe"', "invalid unicode"),
    unreadable("UTF-16", "a batch in UTF-16", GOOD.decode().encode("utf-16"), "Invalid JSON"),
    unreadable("a byte order mark", "a batch after EF BB BF", b"\xef\xbb\xbf" + GOOD, "Invalid JSON"),
    aside("half of a surrogate pair", r'"\ud800" in a text', r'"\ud800"', "cannot be read: Invalid JSON"),
    aside("a number of 5,000 digits", "in images", "9" * 5000, "number out of range"),
    aside("nesting of 100,000 levels", "in images", DEEP, "recursion limit", measured=True),
    unreadable(
        "nesting outside of any group",
        "100,000 opening brackets",
        b"[" * 100_000,
        "recursion limit",
        measured=True,
    ),
    unreadable(
        "more groups than any batch has",
        "{}, 100,000 times",
        b'{"batch": [' + b"{}," * 99_999 + b"{}]}",
        "List should have at most 65536 items",
        measured=True,
    ),
    unreadable(
        "lists without number",
        "[, 16 million times, in 16 MiB",
        b'{"batch": [{"images": ' + b"[" * 16_000_000,
        "lists and objects, the maximum is",
        measured=True,
    ),
    lost(
        "wrong content type",
        "a page of a proxy, text/html",
        Answer(content_type="text/html", body=b"<html>"),
        "content type 'text/html', not JSON: is this the Atropos API",
    ),
    lost(
        "no content type", "a batch without a label", Answer(content_type=None, body=GOOD), "'none', not JSON"
    ),
    lost("no content", "status 204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "not JSON"),
]

TRANSFER = [
    arrived(
        "a chunked body",
        "a good batch in pieces of 100 bytes",
        chunked(*(GOOD[i : i + 100] for i in range(0, len(GOOD), 100))),
    ),
    arrived(
        "a body without a length",
        "a good batch that ends with the connection",
        Answer(body=GOOD, announce_length=False),
    ),
    arrived(
        "gzip in two members",
        "a good batch, compressed in two parts",
        gzipped(gzip.compress(GOOD[:50]) + gzip.compress(GOOD[50:])),
    ),
    arrived(
        "charset in the content type",
        "application/json; charset=utf-8",
        Answer(body=GOOD, content_type="application/json; charset=utf-8"),
    ),
    lost(
        "a body cut off",
        "half of the announced length",
        Answer(body=GOOD, cut_at=60),
        "ended before the reply",
    ),
    lost(
        "a chunked body cut off",
        "chunks without the last one",
        chunked(GOOD, end=b""),
        "ended before the reply",
    ),
    lost(
        "a broken chunk",
        "a chunk length that is no number",
        raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
        "ended before the reply",
    ),
    lost(
        "broken gzip",
        "gzip with a wrong byte in the middle",
        gzipped(gzip.compress(GOOD)[:20] + b"\xff" * 20),
        "gzip data is (broken|cut off)",
    ),
    lost("gzip cut off", "half of the gzip data", gzipped(gzip.compress(GOOD)[:-20]), "cut off"),
    lost("gzip that is none", "plain JSON labelled as gzip", gzipped(GOOD), "gzip data is broken"),
    lost(
        "another compression",
        "labelled as br",
        Answer(body=GOOD, headers={"Content-Encoding": "br"}),
        "only gzip was asked for",
    ),
    lost(
        "gzip in gzip",
        "labelled as gzip, gzip",
        Answer(body=gzip.compress(gzip.compress(GOOD)), headers={"Content-Encoding": "gzip, gzip"}),
        "only gzip was asked for",
    ),
    lost(
        "a gzip bomb",
        "64 MiB of zeros in 64 KiB, over and over",
        Answer(body=bomb(64), headers={"Content-Encoding": "gzip"}, repeat=64),
        "more bytes than the maximum",
        measured=True,
    ),
    lost(
        "gzip of nothing, without an end",
        "empty gzip members, over and over",
        Answer(body=gzip.compress(b"") * 3200, headers={"Content-Encoding": "gzip"}, repeat=2000),
        "more bytes on the wire|did not finish in time",
        patience=2.0,
        measured=True,
    ),
    lost(
        "a giant body",
        "1 GiB of spaces, the maximum is 16 MiB",
        Answer(body=b" " * (1 << 20), repeat=1024),
        "more bytes on the wire than the maximum",
        measured=True,
    ),
    lost(
        "a giant announced length",
        "Content-Length: 10^15",
        raw(HEAD + b"Content-Length: 1000000000000000\r\n\r\n{}"),
        "announces 1000000000000000 bytes",
    ),
    lost(
        "a giant header",
        "1 MiB of headers",
        raw(HEAD + b"X: " + b"x" * (1 << 20) + b"\r\n\r\n{}"),
        "ended before the reply|broke after",
    ),
    lost(
        "no HTTP at all",
        "the greeting of an SSH server",
        raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
        "ended before the reply",
    ),
    lost(
        "an endless slow body",
        "one byte every 50 ms",
        Answer(body=GOOD, drip=0.05),
        "did not finish in time",
        patience=2.0,
    ),
    lost(
        "silence",
        "no byte for longer than atropos.read_timeout",
        Answer(body=GOOD, delay=4.0),
        "no reply in time",
        patience=2.0,
    ),
    lost(
        "a connection closed without a reply",
        "the server hangs up",
        Answer(hang_up=True),
        "ended before the reply",
    ),
    lost("a connection reset", "a TCP reset in place of a reply", raw(b"", reset=True), "broke after"),
    lost(
        "a connection reset in the body",
        "a TCP reset after half of the body",
        raw(HEAD + b"Content-Length: 9999\r\n\r\n" + GOOD, reset=True),
        "broke after",
    ),
]

STATUSES = [
    harmless(
        "429 with Retry-After",
        "status 429, Retry-After: 1",
        Answer(status=429, headers={"Retry-After": "1"}, body=b"slow down"),
    ),
    harmless(
        "429 with an absurd Retry-After",
        "Retry-After: 10^300 and one that is no number",
        Answer(status=429, headers={"Retry-After": "1" + "0" * 300}),
        Answer(status=429, headers={"Retry-After": "soon"}),
    ),
    ReplyCase(
        name="a storm of 500s",
        sent="status 500, thirty times",
        outcome="possibly lost",
        says="status 500",
        answers=[Answer(status=500, body=b"Internal Server Error")] * 30,
    ),
    lost(
        "503 of a proxy",
        "status 503 with a page",
        Answer(status=503, content_type="text/html", body=b"<html>"),
        "status 503",
    ),
    lost(
        "a giant error page",
        "status 500 with 1 GiB",
        Answer(status=500, body=b"x" * (1 << 20), repeat=1024),
        "status 500",
        measured=True,
    ),
    refused(
        "404 from the first poll on",
        "status 404",
        ErrorStatus,
        "status 404",
        [Answer(status=404, body=b"no")],
    ),
    refused(
        "access denied from the first poll on",
        "status 401",
        AccessDenied,
        "check the token and headers",
        [Answer(status=401, body=b"no")],
    ),
    refused(
        "no registration",
        "status 500 to /register",
        ServerError,
        "status 500",
        others={"register": Answer(status=500, body=b"broken")},
    ),
    refused(
        "a redirect to the same host",
        "status 307 to another path, from the first poll on",
        ErrorStatus,
        "redirects are not followed: configure the final address",
        [Answer(status=307, headers={"Location": "/elsewhere"})],
    ),
    refused(
        "only ever 500",
        "status 500 for longer than atropos.batch_timeout",
        (BatchPossiblyLost, DeadlineExceeded),
        "status 500",
        [Answer(status=500, body=b"broken")] * 10_000,
        options=QUICK_PATIENCE,
    ),
    refused(
        "no data for too long",
        "no batch within atropos.batch_timeout",
        DeadlineExceeded,
        r"atropos.batch_timeout.*no environment connected",
        [Answer(body=b'{"batch":null}')] * 10_000,
        options=QUICK_PATIENCE,
    ),
    refused(
        "an address that nothing listens at",
        "connections are refused",
        ApiUnreachable,
        "does the Atropos API run",
        address=f"http://127.0.0.1:{free_port()}",
        options=QUICK_PATIENCE,
    ),
    refused(
        "a host that does not exist",
        "the name has no address (DNS)",
        ApiUnreachable,
        "cannot connect",
        address="http://atropos.invalid:8000",
        options=QUICK_PATIENCE,
    ),
    harmless(
        "forgotten by the API",
        '"Trainer not registered", as after a restart',
        Answer(body=b'{"status":"error","message":"Trainer not registered.","batch":[]}'),
    ),
    harmless("an empty batch", '{"batch": []}', Answer(body=b'{"batch":[]}')),
]

ZIPPED_EMPTY = harmless("an empty reply as gzip", '{"batch": null}, compressed', zipped(b'{"batch":null}'))

REPLY_CASES: list[ReplyCase] = [*BODIES, *TRANSFER, *STATUSES, ZIPPED_EMPTY]
