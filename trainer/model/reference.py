"""A frozen reference model: where the log-probs come from that a KL penalty compares the policy with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import DataSettings, ModelSettings
from trainer.errors import ConfigurationError
from trainer.model.attention import require_splittable
from trainer.model.lm_head import LogitTransform
from trainer.model.lm_head.select import choose_head
from trainer.model.load import DTYPES, context_length, inspect_beside, load_beside, reads_rows_only
from trainer.model.select_packing import choose_packing
from trainer.model.sequence_parallel import SequenceGroup
from trainer.model.sharding import WHOLE, Spread
from trainer.model.token_logprobs import TokenLogProbs, token_logprobs
from trainer.packing import MicroBatch, Packing
from trainer.samples.validation import ModelLimits


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """Scores micro-batches without gradient."""

    model: nn.Module
    """On its device; the policy itself where its base weights are the reference."""
    head: LogitTransform | None
    is_policy: bool
    """Its adapters are switched off while it scores."""
    group: SequenceGroup | None = None
    """See `token_logprobs`."""

    def score(self, batch: MicroBatch, *, use_temperature: bool) -> Tensor:
        """Return the reference's log-probs of a micro-batch's trained tokens, [N] float32."""
        with _without_adapters(self.model) if self.is_policy else contextlib.nullcontext():
            scores = score(
                self.model, batch, use_temperature=use_temperature, head=self.head, group=self.group
            )
            return scores.logprobs


def load_reference(
    setting: str,
    settings: ModelSettings,
    *,
    policy: nn.Module,
    head: LogitTransform | None,
    packing: Packing,
    limits: ModelLimits,
    spread: Spread = WHOLE,
) -> ReferenceModel | None:
    """Load the model that `loss.reference` names; None if groups bring the reference's log-probs.

    Args:
        setting: `batch`, `base`, or a path or hub id.
        settings: Section `model`.
        policy: The model being trained, unwrapped, with its weights on its device.
        head: The policy's.
        packing: How micro-batches are packed.
        limits: The policy's.
        spread: How the policy's weights are spread over processes; those of another model are spread so
            here, and never stay gathered.

    Raises:
        ConfigurationError: It cannot be loaded, has a smaller vocabulary, or cannot take that packing.
    """
    if setting == "batch":
        return None
    if setting == "base" and settings.lora is not None:
        return ReferenceModel(model=policy, head=head, is_policy=True, group=spread.sequence)
    path = settings.path if setting == "base" else setting
    device = next(policy.parameters()).device
    rows_only = reads_rows_only(settings, spread)
    loaded = load_beside("loss.reference", path, settings, rows_only=rows_only)
    loaded.tested.to(device)
    _refuse_smaller(path, loaded.model, limits)
    try:
        choose_packing(
            loaded.tested, packing, settings.attention, longest_sequence=limits.max_sequence_length
        )
    except ConfigurationError as error:
        raise ConfigurationError(
            f"loss.reference {path!r} cannot compute the policy's micro-batches: {error}"
        ) from error
    if spread.sequence is not None:
        require_splittable(loaded.tested, packing, spread.sequence)
    head = choose_head(loaded.tested, settings.head)
    loaded.model.requires_grad_(False)  # only now: to choose the packing took gradients
    loaded.spread_over(replace(spread, gathered=False), device, DTYPES[settings.dtype])
    return ReferenceModel(model=loaded.model, head=head, is_policy=False, group=spread.sequence)


def inspect_reference(
    setting: str, settings: ModelSettings, data: DataSettings, policy: Any | None
) -> str | None:
    """Look at the model that `loss.reference` names without loading its weights.

    Args:
        setting: See `load_reference`.
        settings: Section `model`.
        data: Section `data`, for the longest sequence.
        policy: The policy without its weights, or None if that is not here yet.

    Returns:
        What was found; None if no other model is named.

    Raises:
        ConfigurationError: It cannot be loaded, has a smaller vocabulary or a shorter context, or another
            tokenizer.
    """
    if setting in ("batch", "base"):
        return None
    structure = inspect_beside("loss.reference", setting, settings)
    if structure is None or policy is None:
        return f"{setting}: a hub id, not looked at"
    _refuse_smaller(
        setting,
        structure,
        ModelLimits(
            vocabulary_size=policy.get_input_embeddings().num_embeddings,
            max_sequence_length=context_length(policy.config.get_text_config(), data.max_sequence_length),
        ),
    )
    _refuse_other_tokens(setting, settings.tokenizer_path or settings.path)
    return f"{setting}: the policy's vocabulary, and no shorter context"


def _refuse_smaller(path: str, model: Any, limits: ModelLimits) -> None:
    known = model.get_input_embeddings().num_embeddings
    if known < limits.vocabulary_size:
        raise ConfigurationError(
            f"loss.reference {path!r} knows {known} tokens, the policy {limits.vocabulary_size}: "
            "a reference has the policy's tokenizer"
        )
    context = context_length(model.config.get_text_config(), None)
    if context < limits.max_sequence_length:
        raise ConfigurationError(
            f"loss.reference {path!r} has a context of {context} tokens, and sequences may have "
            f"{limits.max_sequence_length}: set data.max_sequence_length to {context}, or name another"
        )


def _refuse_other_tokens(reference: str, policy: str) -> None:
    """Compare what the token ids stand for, where both have a file that says it."""
    ours, theirs = (_token_texts(Path(each) / "tokenizer.json") for each in (policy, reference))
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigurationError(
            f"loss.reference {reference!r} has another tokenizer than the policy ({policy!r}): the same ids "
            "stand for other texts there"
        )


def _token_texts(file: Path) -> Any | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def score(
    model: nn.Module,
    batch: MicroBatch,
    *,
    use_temperature: bool,
    head: LogitTransform | None,
    group: SequenceGroup | None = None,
) -> TokenLogProbs:
    """Score a micro-batch's trained tokens as inference does: no gradient, no dropout.

    Args:
        model: Not wrapped for data parallelism, whose forward pass would wait for the other processes.
        batch: On the model's device.
        use_temperature: See `token_logprobs`.
        head: See `token_logprobs`.
        group: See `token_logprobs`.
    """
    was_training = model.training
    model.eval()
    try:
        return token_logprobs(model, batch, use_temperature=use_temperature, head=head, group=group)
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Switch PEFT's adapters off for a while, and leave who is trained as it was, which PEFT does not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
