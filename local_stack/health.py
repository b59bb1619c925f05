"""Is a service healthy? Exit status 0 if so: `python -m local_stack.health URL... --path DIRECTORY...`.

For the health checks of containers, whose images need not bring curl along.
"""

from __future__ import annotations

import argparse
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

_TIMEOUT = 5.0


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with success; no proxy is asked."""
    # httpx reads the machine's certificates for each question, and this is asked ten times a second.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT) as reply:
            return bool(reply.status == 200)
    except (OSError, HTTPException):
        return False


def main() -> None:
    """Check what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m local_stack.health", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL", help="must answer with success")
    parser.add_argument("--path", type=Path, action="append", default=[], help="must exist; may be repeated")
    args = parser.parse_args()
    healthy = all(map(answers, args.urls)) and all(path.exists() for path in args.path)
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
