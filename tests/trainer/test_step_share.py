"""What process 0 sends of a step arrives as it was, and all processes together compute the step once."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from tests.trainer.models import random_tree_samples
from trainer.packing import MicroBatch, Packing, pack
from trainer.run.step_share import StepShare, share_out


def micro_batches_of(packing: Packing, *, budget: int = 60) -> list[MicroBatch]:
    samples = random_tree_samples(5)
    batches = pack(samples, [7.0] * len(samples), packing=packing, tokens_per_micro_batch=budget)
    chosen = torch.arange(len(batches[0].targets))
    taught = {
        "teacher_token_ids": chosen[:, None],
        "teacher_logprobs": torch.full((len(chosen), 1), -torch.inf),
    }
    return [dataclasses.replace(batches[0], **taught), *batches[1:]]


def assert_same(ours: MicroBatch, theirs: MicroBatch) -> None:
    for field in dataclasses.fields(MicroBatch):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), field.name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("packing", get_args(Packing))
def test_a_share_arrives_as_it_was_sent(packing: Packing) -> None:
    (share, _) = share_out(micro_batches_of(packing), 2, step=3, staleness=None, with_columns=False)
    sent = dataclasses.replace(share, columns={"advantages": torch.randn(5)}, staleness=2)
    got = StepShare.from_bytes(sent.to_bytes())
    assert (got.step, got.staleness, got.has_reference) == (3, 2, False)
    assert torch.equal(got.columns["advantages"], sent.columns["advantages"])
    for ours, theirs in zip(got.micro_batches, sent.micro_batches, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("processes", [1, 2, 3, 50])
def test_shares_are_equally_many_and_each_micro_batch_counts_once(processes: int) -> None:
    batches = micro_batches_of("plain")
    shares = share_out(batches, processes, step=0, staleness=0, with_columns=False)
    assert len({len(share.micro_batches) for share in shares}) == 1
    counted = [each for share in shares for each in share.micro_batches if each.loss_mask.any()]
    assert {id(each.targets) for each in counted} == {id(each.targets) for each in batches}
    assert len(counted) == len(batches)
