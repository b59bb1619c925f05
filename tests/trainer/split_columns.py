"""One of several processes that compute micro-batches together, a slice of columns each, and also alone.

Run by `test_sequence_parallel`; fails where the two differ, with whole weights and with spread ones.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from tests.trainer.models import make_exact, make_sample, random_tree_samples, tiny_model
from trainer.config import ParallelSettings
from trainer.model.attention import TILED, register_backends
from trainer.model.lm_head import LogitTransform
from trainer.model.sequence_parallel import SequenceGroup
from trainer.model.sharding import WHOLE, Spread, make_spread
from trainer.model.token_logprobs import token_logprobs
from trainer.packing import MicroBatch, pack
from trainer.samples.sample import Sample

EXACTNESS = 1e-12
"""Of the largest gradient, in float64."""


def micro_batch(samples: list[Sample]) -> MicroBatch:
    (batch,) = pack(samples, [1.0] * len(samples), packing="prefix_tree", tokens_per_micro_batch=1 << 30)
    return batch


def micro_batches() -> dict[str, MicroBatch]:
    forest = random_tree_samples(1, count=12)
    long = make_sample(list(range(60)), 58)  # whose first columns predict nothing that is trained
    short = make_sample([5, 6], 1)
    teacher = micro_batch(forest)
    candidates = teacher.targets[:, None].repeat(1, 3)
    candidates[::2, 2] = -1
    return {
        "forest": micro_batch(forest),
        "trained at its end": micro_batch([long]),
        "shorter than the processes are many": micro_batch([short]),
        "with a teacher": replace(
            teacher, teacher_token_ids=candidates, teacher_logprobs=torch.zeros(candidates.shape)
        ),
    }


def gradients(
    model: nn.Module,
    batch: MicroBatch,
    head: LogitTransform | None,
    group: SequenceGroup | None = None,
    spread: Spread = WHOLE,
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs, entropies and candidates; the gradients of a sum of squares that all of them are in."""
    model.zero_grad()
    with spread.micro_batch(model, last=True):
        scores = token_logprobs(
            model, batch, use_temperature=True, head=head, entropy_gradient=True, group=group
        )
        found = [each for each in (scores.logprobs, scores.entropy, scores.candidates) if each is not None]
        torch.autograd.backward(
            sum((each.square() * batch.loss_mask.double().mean()).sum() for each in found)
        )
    made = [torch.zeros_like(each) if each.grad is None else each.grad for each in model.parameters()]
    for gradient in made if group is not None and not spread.sharded else ():
        distributed.all_reduce(gradient)
    whole = [each.full_tensor() if isinstance(each, DTensor) else each.clone() for each in made]
    return [each.detach() for each in found], whole


def assert_equal(ours: list[Tensor], theirs: list[Tensor], case: Any) -> None:
    largest = max(float(each.abs().max()) for each in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACTNESS * largest, msg=f"{case}")


def tiny(architecture: str, head: LogitTransform | None) -> Any:
    model: Any = make_exact(tiny_model(architecture, attention=TILED))
    model.train()
    if head is None and architecture != "gpt2":
        model.activation_checkpointing_enable()
    return model


def main() -> None:
    distributed.init_process_group("gloo")
    register_backends()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    settings = ParallelSettings(mode="sharded", sequence=size)
    spread = make_spread(settings, processes=size, rank=rank, device=torch.device("cpu"))
    group = spread.sequence
    for architecture, head in product(("llama", "qwen3", "gpt2"), (LogitTransform(), None)):
        model, parts = tiny(architecture, head), tiny(architecture, head)
        spread.shard(parts)
        for name, batch in micro_batches().items():
            alone = gradients(model, batch, head)
            for case, together in (
                ("whole weights", gradients(model, batch, head, group)),
                ("spread weights", gradients(parts, batch, head, group, spread)),
            ):
                for ours, theirs in zip(together, alone, strict=True):
                    assert_equal(ours, theirs, (architecture, head, name, case))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
