"""Is a service healthy? Exit status 0 if so: `python -m local_stack.health URL... --path DIRECTORY...`.

For the health checks of containers, whose images need not bring curl along; and with `--generate URL` for an
inference server that is healthy, but whose first reply takes long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from local_stack.services import answers, generates


def is_healthy(urls: Sequence[str], paths: Sequence[Path]) -> bool:
    """Whether every URL answers with success and every path exists."""
    return all(answers(url) for url in urls) and all(path.exists() for path in paths)


def main() -> None:
    """Check what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m local_stack.health", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL", help="must answer with success")
    parser.add_argument("--path", type=Path, action="append", default=[], help="must exist; may be repeated")
    parser.add_argument(
        "--generate", metavar="URL", help="base URL of an inference server that must generate a token"
    )
    args = parser.parse_args()
    healthy = is_healthy(args.urls, args.path) and (args.generate is None or generates(args.generate))
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
