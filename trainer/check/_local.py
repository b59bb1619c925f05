"""What lies on this machine: the model, and the directories that a run writes to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODEL = "model"


def check_model(config: TrainerConfig) -> tuple[CheckResult, PreTrainedTokenizerBase | None]:
    """Read the model's configuration and tokenizer, not its weights; compare their vocabularies."""
    from transformers import AutoConfig, AutoTokenizer

    path, remote = config.model.path, config.model.trust_remote_code
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=remote)
        tokenizer = AutoTokenizer.from_pretrained(
            config.model.tokenizer_path or path, trust_remote_code=remote
        )
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        return failed(_MODEL, first_line, "set model.path to a checkpoint directory or hub id"), None
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        found = f"the tokenizer makes token ids up to {largest}, the model knows {model.vocab_size}"
        return failed(_MODEL, found, "use the model's own tokenizer (model.tokenizer_path)"), tokenizer
    context = getattr(model, "max_position_embeddings", None)
    if isinstance(context, int) and context < config.atropos.max_token_length:
        found = f"its context is {context} tokens, environments may send {config.atropos.max_token_length}"
        return warned(_MODEL, found, "lower atropos.max_token_length; longer groups are set aside"), tokenizer
    return passed(_MODEL, f"{path}: {model.model_type}, vocabulary {model.vocab_size}"), tokenizer


def check_writable(name: str, directory: Path, *, bytes_needed: int) -> CheckResult:
    """Write a file into a directory (made if missing), and look at the space beside it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(b"x")
            file.flush()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return failed(name, f"{directory}: {error.strerror}", "choose another directory, or its permissions")
    gigabytes = f"{free / 1e9:.1f} GB free"
    if free < bytes_needed:
        found = f"{directory}: {gigabytes}, about {bytes_needed / 1e9:.1f} GB are needed"
        return failed(name, found, "make space, or lower checkpoint.keep and publish.keep")
    return passed(name, f"{directory} can be written to, {gigabytes}")
