"""Checks what lies on this machine: the model, and the directories that a run writes to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_client import AtroposClientError
from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig
from trainer.errors import ConfigurationError, TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODEL = "model"
_REFERENCE = "reference"
_PROCESSES = "processes"


def check_processes(config: TrainerConfig) -> CheckResult:
    """Find the other processes that the launcher started, as a run does, and count them."""
    from trainer.run.accelerator import describe_processes, make_accelerator

    try:
        accelerator = make_accelerator(config)
    except ConfigurationError as error:
        found, _, remedy = str(error).partition(": ")
        return failed(_PROCESSES, found, remedy)
    return passed(
        _PROCESSES, f"{describe_processes(accelerator, config.parallel)} would train, on {accelerator.device}"
    )


_LARGEST_LOADED = 4 << 30
"""Bytes of weights that a check loads: encoders are smaller, and a check must not need a run's memory."""


def check_model(config: TrainerConfig) -> tuple[list[CheckResult], PreTrainedTokenizerBase | None]:
    """Account for every tensor by the files' headers, and compare the vocabularies."""
    from transformers import AutoConfig

    from trainer.model.load import dropout_rates, inspect_model, load_policy_tokenizer

    path, remote = config.model.path, config.model.trust_remote_code
    try:
        structure = inspect_model(config.model)
        model = AutoConfig.from_pretrained(path, trust_remote_code=remote).get_text_config()
        tokenizer = load_policy_tokenizer(config.model)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        return [failed(_MODEL, first_line, "set model.path to a checkpoint directory or hub id")], None
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        found = f"the tokenizer makes token ids up to {largest}, the model knows {model.vocab_size}"
        remedy = "use the model's own tokenizer (model.tokenizer_path)"
        return [failed(_MODEL, found, remedy)], tokenizer
    known = "every tensor accounted for" if structure is not None else "a hub id, its tensors not looked at"
    results = [passed(_MODEL, f"{path}: {model.model_type}, vocabulary {model.vocab_size}, {known}")]
    results += _check_reference(config, structure)
    context = getattr(model, "max_position_embeddings", None)
    if isinstance(context, int) and context < config.atropos.max_token_length:
        found = f"its context is {context} tokens, environments may send {config.atropos.max_token_length}"
        results.append(warned(_MODEL, found, "lower atropos.max_token_length; longer groups are set aside"))
    if structure is not None and config.model.dropout == "keep" and (rates := dropout_rates(structure)):
        found = f"it drops in training ({', '.join(sorted(rates))}), which its sampler does not"
        results.append(warned(_MODEL, found, "set model.dropout to none, unless the loss has no ratio"))
    return results, tokenizer


def _check_reference(config: TrainerConfig, policy: Any | None) -> list[CheckResult]:
    from trainer.model.reference import inspect_reference

    try:
        found = inspect_reference(config.loss.reference, config.model, config.data, policy)
    except ConfigurationError as error:
        return [failed(_REFERENCE, str(error), "set loss.reference to a checkpoint directory or hub id")]
    return [] if found is None else [passed(_REFERENCE, found)]


def check_start(config: TrainerConfig) -> CheckResult:
    """Ask whether a run can start in the output directory, as the run does, and test a small model."""
    from trainer.model.select_packing import refuse_looking_ahead
    from trainer.run.start import look_at_start
    from trainer.run.train_state import load_trained_policy

    tested = "no token changes the log-probs of those before it"
    try:
        checkpoint, damaged = look_at_start(config)
        if 0 < weight_bytes(Path(config.model.path)) <= _LARGEST_LOADED:
            refuse_looking_ahead(load_trained_policy(config, checkpoint).model)
        else:
            tested = "the weights are not loaded here, it tests them when it starts"
    except (TrainerError, AtroposClientError) as error:
        return failed("start", str(error), "a run would refuse to start")
    begin = (
        f"goes on from {checkpoint.path.name}" if checkpoint is not None else "begins with the base weights"
    )
    if damaged:
        return warned("start", "; ".join(map(str, damaged)), f"a run sets that aside, and {begin}")
    return passed("start", f"a run {begin}; {tested}")


def weight_bytes(path: Path) -> int:
    """Size of the safetensors files in a directory; 0 for a hub id, whose size is not known here."""
    files: Iterable[Path] = path.glob("*.safetensors") if path.is_dir() else ()
    return sum(file.stat().st_size for file in files)


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
