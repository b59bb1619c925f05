"""The way of a bad batch up to the step: fetched, read and prepared by the real parts, nothing trained.

What is prepared decides what is trained: rows that end here must leave what the good parts alone leave.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from atropos_client import AtroposClient, BatchPossiblyLost, InvalidReply, parse_batch
from tests.hostile.case import Case
from tests.hostile.harness import configure, impatient, training_of
from trainer.config import TrainerConfig
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.validation import ModelLimits
from trainer.sources.live import fetcher_settings

LIMITS = ModelLimits(vocabulary_size=259, max_sequence_length=2048)
"""Those of the tiny model."""


class Preparation:
    """Prepares the batches of one run, in order."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._normalizer = AdvantageNormalizer(config.data.advantage_normalization)
        self.steps: list[PreparedBatch] = []
        self.reasons: list[str] = []

    def add(self, body: bytes) -> None:
        try:
            reply = parse_batch(body)
        except InvalidReply as error:
            self.reasons.append(str(error))
            return
        batch = prepare_batch(
            reply,
            limits=LIMITS,
            data=self._config.data,
            loss=self._config.loss,
            normalizer=self._normalizer,
        )
        self.reasons += [group.reason for group in batch.set_aside]
        if batch.empty_reason is None:
            self.steps.append(batch)
        else:
            self.reasons.append(batch.empty_reason)


def check_briefly(case: Case, url: str, directory: Path) -> None:
    """Fetch and prepare the bad batch and the good one after it, and compare with the good parts alone."""
    bodies = case.good_bodies()
    config = configure(Path("no-model"), directory, url, training_of(case))
    found, expected = Preparation(config), Preparation(config)
    with AtroposClient(impatient(fetcher_settings(config, step=0))) as client:
        if case.outcome == "possibly lost":
            with pytest.raises(BatchPossiblyLost, match=case.says):
                client.fetch_batch()
        else:
            found.add(client.fetch_batch())
        found.add(client.fetch_batch())
    for body in bodies:
        expected.add(body)
    assert bool(found.reasons) == (case.outcome == "set aside"), found.reasons
    assert expected.reasons == []
    for reason in found.reasons:
        assert re.search(case.says, reason), reason
    assert len(found.steps) == len(expected.steps)
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert_same_step(ours, theirs)


def assert_same_step(ours: PreparedBatch, theirs: PreparedBatch) -> None:
    """Bit for bit; only a group's place in its batch is another where one before it was set aside."""
    assert (ours.denominators, ours.normalizer) == (theirs.denominators, theirs.normalizer)
    assert len(ours.samples) == len(theirs.samples)
    for one, other in zip(ours.samples, theirs.samples, strict=True):
        assert (one.temperature, one.score) == (other.temperature, other.score)
        for name in ("tokens", "loss_mask", "advantages", "inference_logprobs", "ref_logprobs"):
            value, wanted = getattr(one, name), getattr(other, name)
            assert (value is None) == (wanted is None), name
            assert value is None or torch.equal(value, wanted), name
