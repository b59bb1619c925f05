"""The command `atropos-train`."""

from trainer.cli._main import Command, main

__all__ = ["Command", "main"]
