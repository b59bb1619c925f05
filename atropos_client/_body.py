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
    """Reads one body from raw network chunks."""

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

    def read(self, response: httpx.Response, *, whole: bool = True) -> bytes:
        """Return the body of a reply, decompressed.

        Args:
            response: A reply whose body has not been read.
            whole: Read it to its end; otherwise no more than its first piece.

        Raises:
            ReplyTooLarge: If the announced length, or what comes, is beyond the limit.
            ReplyTimeout: If the body as a whole takes too long.
            InvalidReply: If it is compressed with anything but gzip, or the gzip data is broken or cut off.
        """
        self._begin(response.headers)
        for chunk in response.iter_raw():
            self._feed(chunk)
            if not whole:
                break
        if whole and self._inflater is not None and self._wire_size and not self._inflater.eof:
            raise InvalidReply(f"the gzip data is cut off after {self._wire_size} bytes")
        return bytes(self._body)

    def _begin(self, headers: httpx.Headers) -> None:
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"gzip", "x-gzip", "identity", ""}:
            raise InvalidReply(f"the reply is compressed with {encoding!r}; only gzip was asked for")
        if "gzip" in encoding:
            self._inflater = zlib.decompressobj(_GZIP_WINDOW)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            raise ReplyTooLarge(f"the reply announces {announced} bytes, the maximum is {self._limit}")

    def _feed(self, chunk: bytes) -> None:
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
