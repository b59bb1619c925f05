"""Make one of the built-in models ready: `python -m local_stack.prepare_model demo --link DIRECTORY`.

A process of its own, because it loads torch, which neither the launcher nor an image build needs to keep.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from local_stack.models import default_cache_directory, make_tiny_model, prepare_demo_model

logger = logging.getLogger(__name__)


def prepare_model(name: str, *, cache_dir: Path | None = None) -> Path:
    """Return the directory of the built-in model `name` (demo or tiny), made on the first call."""
    if name == "demo":
        return prepare_demo_model(cache_dir)
    # Heads of 32: vLLM on the CPU takes no smaller ones.
    return make_tiny_model((cache_dir or default_cache_directory()) / "tiny-random-model", head_size=32)


def point_link_at(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, replacing an earlier link in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.resolve(), target_is_directory=True)
    aside.replace(link)


def main() -> None:
    """Prepare the model named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(prog="python -m local_stack.prepare_model", description=__doc__)
    parser.add_argument("name", choices=("demo", "tiny"), help="demo: SmolLM2-135M-Instruct; tiny: random")
    parser.add_argument("--link", type=Path, required=True, help="symbolic link to make to its directory")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where models are kept")
    arguments = parser.parse_args()
    directory = prepare_model(arguments.name, cache_dir=arguments.cache_dir)
    point_link_at(arguments.link, directory)
    logger.info("%s is %s", arguments.link, directory)


if __name__ == "__main__":
    main()
