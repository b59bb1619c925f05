"""Shows a run from a process of its own, so that the interpreter of the trainer never parses a batch for it.

`python -m trainer.view.worker DIR` answers requests, one a line of JSON, on its standard output: a line with
status, type, headers and length, then the body. It ends with its standard input, and is the first to give way
when the processor is wanted.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import IO, Final

from trainer.monitoring.server import SITE_SECONDS, PageReply, PageRequest
from trainer.view.access import Access, refuse

logger = logging.getLogger(__name__)

_LONGEST_HEAD: Final = 1 << 16
_NICER: Final = 10
_PACKAGES: Final = Path(__file__).resolve().parent.parent.parent
"""Where our packages lie."""

Answer = Callable[[str, str], PageReply]
"""Answers a path and a query."""


class GuardedSite:
    """Asks for the right to see the page before it is made.

    Args:
        access: The rule.
        answer: Makes the page.
    """

    def __init__(self, access: Access, answer: Answer) -> None:
        self._access = access
        self._answer = answer

    def __call__(self, request: PageRequest) -> PageReply:
        """Answer a request."""
        return self._access.refusal(request) or self._answer(request.path, request.query)


class ViewWorker:
    """Starts the process when the page is first asked for, and again where it has ended.

    Args:
        directory: The run's output directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, path: str, query: str) -> PageReply:
        """Answer a request; one at a time."""
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._process = self._start()
        assert process.stdin is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101
        overdue = threading.Timer(SITE_SECONDS, process.kill)
        overdue.daemon = True
        overdue.start()
        try:
            process.stdin.write(json.dumps([path, query]).encode() + b"\n")
            process.stdin.flush()
            return _read_reply(process.stdout)
        except (OSError, ValueError, LookupError) as error:
            self.close()
            logger.warning("The page of the run could not be made: %s", error)
            return refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the process that makes the page ended; ask again")
        finally:
            overdue.cancel()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(_PACKAGES), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return subprocess.Popen(  # noqa: S603 - our own interpreter and our own module
            # -P: no file in the working directory may pass for a module.
            [sys.executable, "-P", "-m", "trainer.view.worker", str(self._directory.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,  # a Ctrl-C is the trainer's
        )

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # what was not written yet has no reader any more
                        logger.debug("the pipe to the page's process was not empty")


def _read_reply(stream: IO[bytes]) -> PageReply:
    head = stream.readline(_LONGEST_HEAD)
    if not head:
        raise OSError("its process has ended")
    status, content_type, headers, length = json.loads(head)
    body = stream.read(length)
    if len(body) != length:
        raise OSError("its process ended in the middle of a reply")
    return PageReply(HTTPStatus(status), content_type, body, tuple((name, value) for name, value in headers))


def serve(directory: Path, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    from trainer.view.run_reader import RunReader
    from trainer.view.site import RunSite

    site = RunSite([RunReader(directory)], live=True)
    for line in requests:
        path, query = json.loads(line)
        try:
            reply = site.answer(path, query)
        except Exception as error:  # noqa: BLE001 - the page says it; the process serves the next request
            reply = refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        head = [reply.status, reply.content_type, reply.headers, len(reply.body)]
        replies.write(json.dumps(head).encode() + b"\n" + reply.body)
        replies.flush()


if __name__ == "__main__":
    os.nice(_NICER)
    serve(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
