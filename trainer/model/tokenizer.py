"""Loads a tokenizer from a directory or the model hub, or says at once why there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_client.readable import require_readable, why_not_there
from trainer.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_directory_or_hub_id(setting: str, path: str) -> None:
    """Refuse what is no directory and cannot be meant for a hub id, which transformers would ask the hub for.

    Raises:
        ConfigurationError: It is a file, or a path of this machine where nothing is.
    """
    place = Path(path)
    looks_local = place.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    looks_local = looks_local or (len(place.parts) > 1 and Path(place.parts[0]).is_dir())
    if (looks_local or os.path.lexists(path)) and not place.is_dir():
        found = "it is a file" if place.exists() else why_not_there(place)
        raise ConfigurationError(
            f"{setting} {path!r} cannot be used: {found}; give a checkpoint directory or a hub id"
        )


def load_tokenizer(
    setting: str, path: str, *, trust_remote_code: bool = False, ask_hub: bool = True
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        setting: What named it, for messages.
        path: Directory, or hub id.
        trust_remote_code: Whether code beside it may run.
        ask_hub: Whether the model hub may be asked for what is not on this machine.

    Raises:
        ConfigurationError: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    require_directory_or_hub_id(setting, path)
    is_here = Path(path).is_dir()
    if ask_hub and not is_here:
        sys.stderr.write(f"{path} is no directory here: asking the model hub for it\n")
    try:
        require_readable(path)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=not ask_hub
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        if not (ask_hub or is_here):
            raise ConfigurationError(
                f"{setting} {path!r} cannot be used: there is no such directory, and no model of this name "
                "that was fetched from the hub before"
            ) from error
        raise ConfigurationError(
            f"{setting} {path!r} cannot be loaded: {error}. It must be a directory with a tokenizer, or a "
            "hub id"
        ) from error
    return loaded
