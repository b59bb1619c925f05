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

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from trainer.config import LossSettings
from trainer.losses import LossInputs
from trainer.samples.prepare import PreparedBatch
from trainer.samples.sample import Sample


def make_step(
    batch: PreparedBatch, loss: LossSettings, *, multiple: int, staleness: int | None = None
) -> tuple[TensorDict, dict[str, Any]]:
    """Turn a batch, so many versions old, into rows and what verl wants beside them for one step over all."""
    rows = make_rows(batch.samples, batch.denominators, multiple=multiple)
    statistics = None
    if loss.bound.step_statistics is not None:
        sampler, advantages = rows["old_log_probs"].values(), rows["advantages"].values()
        mask = rows["response_mask"].values()
        inputs = LossInputs(
            logprobs=sampler, advantages=advantages, loss_mask=mask, inference_logprobs=sampler
        )
        statistics = loss.bound.step_statistics(inputs, loss.bound.options)
    info: dict[str, Any] = {
        "statistics": statistics,  # as of `LossInputs`
        "staleness": staleness,
        # verl's own reductions over sequences divide by it: rows that fill up do not count.
        "global_batch_size": len(batch.samples),
        "mini_batch_size": len(rows),
    }
    temperatures = {sample.temperature for sample in batch.samples} if loss.uses_temperature else {1.0}
    if len(temperatures) == 1:  # one for all takes verl's faster way
        del rows["temperature"]
        info["temperature"] = temperatures.pop()
    return rows, info


def make_rows(
    real: Sequence[Sample], denominators: Sequence[float] | None = None, *, multiple: int
) -> TensorDict:
    """Turn samples into [B] rows: the columns of `_row` jagged, without log-probs that a sample lacks.

    Rows of two tokens that nothing is trained on follow until `multiple` divides their number: verl deals
    rows out evenly. `denominators` (None: 1) and `temperature` are [B] float32; `num_turns` [B], the runs of
    trained tokens, is for the metrics of verl.
    """
    padding = -len(real) % multiple
    samples = [*real, *[bare_sample([0, 0], trained=False)] * padding]
    rows = [_row(sample) for sample in samples]
    columns = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        for name in rows[0]
    }
    if any(sample.inference_logprobs is None for sample in real):
        del columns["old_log_probs"]
    if any(sample.ref_logprobs is None for sample in real):
        del columns["ref_log_prob"]
    columns["denominators"] = torch.tensor([*(denominators or [1.0] * len(real)), *[1.0] * padding])
    columns["temperature"] = torch.tensor([sample.temperature for sample in samples])
    columns["num_turns"] = torch.tensor([int(sample.loss_mask.diff().clamp(0).sum()) for sample in samples])
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


def _row(sample: Sample) -> dict[str, Tensor]:
    """Return the columns of a sequence; `returns` and `rm_scores` are for the metrics of verl."""
    trained = sample.loss_mask != 0
    start = int(trained.nonzero()[0]) if trained.any() else len(trained) - 1

    def response(column: Tensor | None) -> Tensor:
        """0 where nothing is trained, whatever filler the environment sent there."""
        values = torch.zeros(len(trained)) if column is None else column
        return values.masked_fill(~trained, 0.0)[start:]

    score = torch.zeros(len(trained) - start)
    score[-1] = sample.score
    return {
        "input_ids": sample.tokens,
        "position_ids": torch.arange(len(trained)),
        "prompts": sample.tokens[:start],
        "responses": sample.tokens[start:],
        "response_mask": trained[start:].long(),
        "loss_mask": trained[start:].long(),
        "advantages": response(sample.advantages),
        "returns": response(sample.advantages),
        "old_log_probs": response(sample.inference_logprobs),
        "ref_log_prob": response(sample.ref_logprobs),
        "rm_scores": score,
    }
