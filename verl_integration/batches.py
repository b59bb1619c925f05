"""Validated Atropos batches as the rows of verl.

One row a sequence. Its prompt is all before the first trained token, its response all the rest, with holes in
`response_mask` where an environment or a tool spoke: so masks of several turns survive, and nothing else is
trained. Everything per token of the response stands at that token, as verl has it::

    sample            tokens    [ 12,   7,  31,   5,   2]      loss_mask [0, 0, 1, 0, 1]
    row               prompts   [ 12,   7]     responses [31,   5,   2]
                                        response_mask    [ 1,   0,   1]
                                        advantages       [.5,   0,  .5]
                                        old_log_probs    [-1,   0, -.1]    the sampler's; 0 where masked
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from trainer.config import LossSettings
from trainer.losses import LossInputs
from trainer.samples.prepare import PreparedBatch
from trainer.samples.sample import Sample
from verl_integration.losses import StepFacts


def make_rows(
    real: Sequence[Sample],
    denominators: Sequence[float] | None = None,
    *,
    multiple: int = 1,
    pad_token: int = 0,
) -> TensorDict:
    """Turn samples into rows.

    Args:
        real: At least one.
        denominators: Of each; None: 1.
        multiple: Rows of two tokens that nothing is trained on follow until this divides their number: verl
            deals rows out evenly.
        pad_token: What those consist of.

    Returns:
        [B] rows: jagged `input_ids`, `position_ids`, and of the response alone `responses`, `response_mask`,
        `loss_mask`, `advantages`, `old_log_probs` and, if every sample has them, `ref_log_prob`;
        `denominators` and `temperature` [B] float32. `returns`, `rm_scores` and `num_turns` are for the
        metrics of verl.
    """
    padding = -len(real) % multiple
    samples = [*real, *[bare_sample([pad_token] * 2, trained=False)] * padding]
    starts = [_first_trained(sample) for sample in samples]

    def responses(column: Callable[[Sample], Tensor | None]) -> Tensor:
        """Return a column; 0 where nothing is trained, whatever filler the environment sent there."""
        rows = []
        for sample, start in zip(samples, starts, strict=True):
            values = column(sample)
            values = torch.zeros_like(sample.loss_mask) if values is None else values
            rows.append(values.masked_fill(sample.loss_mask == 0, 0.0)[start:])
        return _jagged(rows)

    mask = responses(lambda sample: sample.loss_mask).long()
    advantages = responses(lambda sample: sample.advantages)
    columns = {
        "input_ids": _jagged([sample.tokens for sample in samples]),
        "position_ids": _jagged([torch.arange(len(sample.tokens)) for sample in samples]),
        "prompts": _jagged([sample.tokens[:start] for sample, start in zip(samples, starts, strict=True)]),
        "responses": _jagged([sample.tokens[start:] for sample, start in zip(samples, starts, strict=True)]),
        "response_mask": mask,
        "loss_mask": mask.clone(),
        "advantages": advantages,
        "returns": advantages.clone(),
        "old_log_probs": responses(lambda sample: sample.inference_logprobs),
        "rm_scores": _jagged(
            [_score_at_the_end(row, start) for row, start in zip(samples, starts, strict=True)]
        ),
        "denominators": torch.tensor([*(denominators or [1.0] * len(real)), *[1.0] * padding]),
        "temperature": torch.tensor([sample.temperature for sample in samples]),
        "num_turns": torch.tensor([_turns(sample) for sample in samples]),
    }
    if all(sample.ref_logprobs is not None for sample in real):
        columns["ref_log_prob"] = responses(lambda sample: sample.ref_logprobs)
    return TensorDict(columns, batch_size=[len(samples)])


def bare_sample(tokens: Sequence[int], *, trained: bool) -> Sample:
    """Make a sequence of which only the tokens matter, and whether all that can be are trained."""
    loss_mask = torch.full((len(tokens),), float(trained))
    loss_mask[0] = 0.0
    return Sample(
        tokens=torch.tensor(tokens),
        loss_mask=loss_mask,
        advantages=torch.zeros(len(tokens)),
        inference_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        score=0.0,
        env_id=None,
        group_index=-1,
    )


def step_facts(batch: PreparedBatch, loss: LossSettings, *, staleness: int | None = None) -> StepFacts:
    """Gather what all rows of a step share.

    Args:
        batch: With at least one sample.
        loss: Section `loss`; its loss may choose tokens over the whole step.
        staleness: Age of the batch in versions; None: not known.
    """
    columns = [sample.inference_logprobs for sample in batch.samples]
    known = [column for column in columns if column is not None]
    masks = torch.cat([sample.loss_mask for sample in batch.samples])
    statistics = None
    if loss.bound.step_statistics is not None:
        sampler = torch.cat(known)
        advantages = torch.cat([sample.advantages for sample in batch.samples])
        inputs = LossInputs(
            logprobs=sampler, advantages=advantages, loss_mask=masks, inference_logprobs=sampler
        )
        statistics = loss.bound.step_statistics(inputs, loss.bound.options)
    return StepFacts(
        has_sampler=len(known) == len(columns),
        tokens=float(masks.sum()),
        statistics=statistics,
        staleness=staleness,
    )


def update_info(
    batch: PreparedBatch, loss: LossSettings, *, rows: int, staleness: int | None = None
) -> dict[str, Any]:
    """Return what verl's update wants beside the rows: one optimizer step over all of them.

    Args:
        batch: The step, with at least one sample.
        loss: Section `loss`.
        rows: How many there are, those that fill up included.
        staleness: Age of the batch in versions; None: not known.
    """
    info: dict[str, Any] = {
        "atropos": step_facts(batch, loss, staleness=staleness),
        # verl's own reductions over sequences divide by it: padding does not count.
        "global_batch_size": len(batch.samples),
        "mini_batch_size": rows,
        "epochs": 1,
        "seed": 0,
        "dataloader_kwargs": {"shuffle": False},
        "calculate_entropy": False,
        "compute_loss": True,
    }
    if not loss.uses_temperature:
        info["temperature"] = 1.0
    elif len(temperatures := {sample.temperature for sample in batch.samples}) == 1:
        info["temperature"] = temperatures.pop()  # one for all takes verl's faster way
    return info


def _jagged(rows: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def _first_trained(sample: Sample) -> int:
    """Where the response begins: at the first trained token, or, where there is none, the last token."""
    trained = sample.loss_mask.nonzero()
    return int(trained[0]) if len(trained) else len(sample.tokens) - 1


def _score_at_the_end(sample: Sample, start: int) -> Tensor:
    scores = torch.zeros(len(sample.tokens) - start)
    scores[-1] = sample.score
    return scores


def _turns(sample: Sample) -> int:
    """Runs of trained tokens."""
    trained = sample.loss_mask != 0
    return int((trained[1:] & ~trained[:-1]).sum())
