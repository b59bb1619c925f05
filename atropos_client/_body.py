"""Reading a reply's body with a bound on its size, before and after decompression.

The decompression is ours, not httpx's, because a few kilobytes of gzip can unfold into gigabytes: the reader
stops at the first byte beyond the limit and never holds more than the limit.
"""

from __future__ import annotations

import zlib
from typing import Final

import httpx

from atropos_client.clock import running_time
from atropos_client.errors import InvalidReply, ReplyTimeout, ReplyTooLarge

_GZIP_WINDOW: Final = 31  # zlib's largest window (15) plus 16 for "expect a gzip header"


class BodyReader:
    """Collects one body from raw network chunks: `begin` with the headers, `feed` each chunk, `finish`."""

    def __init__(self, *, limit: int, patience: float) -> None:
        """Start the clock.

        Args:
            limit: Largest number of bytes, before and after decompression.
            patience: Seconds from now within which the body must be whole.
        """
        self._limit = limit
        self._give_up_at = running_time() + patience
        self._inflater: zlib._Decompress | None = None
        # One growing buffer: as a list of pieces, a body in chunks of two bytes takes thirty times its size.
        self._body = bytearray()
        self._wire_size = 0

    def begin(self, headers: httpx.Headers) -> None:
        """Look at the headers of the reply.

        Raises:
            ReplyTooLarge: If the announced length is beyond the limit.
            InvalidReply: If the body is compressed with anything but gzip.
        """
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"gzip", "x-gzip", "identity", ""}:
            raise InvalidReply(f"the reply is compressed with {encoding!r}; only gzip was asked for")
        if "gzip" in encoding:
            self._inflater = zlib.decompressobj(_GZIP_WINDOW)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            raise ReplyTooLarge(f"the reply announces {announced} bytes, the maximum is {self._limit}")

    def feed(self, chunk: bytes) -> None:
        """Take the next raw chunk.

        Raises:
            ReplyTooLarge: If the body grows beyond the limit.
            ReplyTimeout: If the body as a whole takes too long.
            InvalidReply: If the gzip data is broken.
        """
        if running_time() > self._give_up_at:
            raise ReplyTimeout(f"the body did not finish in time ({self._wire_size} bytes came)")
        self._wire_size += len(chunk)
        # Also on the wire: compressed data may be endless and unfold into nothing.
        if self._wire_size > self._limit:
            raise ReplyTooLarge(f"the reply has more bytes on the wire than the maximum of {self._limit}")
        if self._inflater is None:
            self._keep(chunk)
        else:
            self._inflate(self._inflater, chunk)

    def finish(self, *, whole: bool) -> bytes:
        """Return what came.

        Args:
            whole: Whether the body was read to its end.

        Raises:
            InvalidReply: If it was, and the gzip data ends too early.
        """
        if whole and self._inflater is not None and self._wire_size and not self._inflater.eof:
            raise InvalidReply(f"the gzip data is cut off after {self._wire_size} bytes")
        return bytes(self._body)

    def _inflate(self, inflater: zlib._Decompress, data: bytes) -> None:
        while data:
            if inflater.eof:  # a gzip file may consist of several members, one after the other
                inflater = self._inflater = zlib.decompressobj(_GZIP_WINDOW)
            try:
                # One byte beyond the room that is left is enough to know that it is too much.
                piece = inflater.decompress(data, self._limit - len(self._body) + 1)
            except zlib.error as error:
                raise InvalidReply(f"the gzip data is broken: {error}") from error
            self._keep(piece)
            data = inflater.unused_data

    def _keep(self, piece: bytes) -> None:
        if len(self._body) + len(piece) > self._limit:
            raise ReplyTooLarge(f"the reply has more bytes than the maximum of {self._limit}")
        self._body += piece
