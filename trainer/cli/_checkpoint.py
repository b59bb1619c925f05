"""`atropos-train checkpoint list|verify DIRECTORY`: what a run can go on from, and whether it is whole."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from atropos_client.readable import why_not_there
from schemas import count_of
from trainer.cli._settings import path_argument
from trainer.errors import CheckpointError


class CheckpointCommand:
    """Looks at checkpoints and changes nothing; see `Command`."""

    name = "checkpoint"
    help = "list the checkpoints of a run, or verify every byte of them"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take an action and a directory."""
        parser.add_argument("action", choices=("list", "verify"))
        parser.add_argument(
            "directory",
            type=path_argument,
            help="a run's output directory, its checkpoints/, or one checkpoint",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Print a line a checkpoint; 1 if one is damaged, or there is none."""
        found = _checkpoints_at(args.directory)
        if not found:
            why = f": {why_not_there(args.directory)}" if not args.directory.exists() else ""
            sys.stderr.write(f"atropos-train: there is no checkpoint in {args.directory}{why}\n")
            return 1
        good = [_show(path, verify=args.action == "verify") for path in found]
        return 0 if all(good) else 1


def _checkpoints_at(directory: Path) -> list[Path]:
    from trainer.checkpoints.format import STATE_NAME
    from trainer.checkpoints.manifest import MANIFEST_NAME
    from trainer.checkpoints.retention import list_checkpoints

    if any((directory / name).exists() for name in (MANIFEST_NAME, STATE_NAME)):
        return [directory]
    return list_checkpoints(directory / "checkpoints") or list_checkpoints(directory)


def _show(path: Path, *, verify: bool) -> bool:
    from trainer.checkpoints.format import read_checkpoint, verify_checkpoint

    try:
        checkpoint = verify_checkpoint(path) if verify else read_checkpoint(path)
    except CheckpointError as error:
        sys.stdout.write(f"{path}  {error}\n")
        return False
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9
    state = checkpoint.state
    sys.stdout.write(
        f"{path}  step {state.step}  {count_of(state.batches, 'batch')}  {size:.3f} GB"
        f"{'  whole' if verify else ''}\n"
    )
    return True
