"""Settings of several processes: section `parallel`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trainer.config._base import Section


class ParallelSettings(Section):
    """Spread of the weights over the processes that train together."""

    mode: Literal["replicated", "sharded", "gathered"] = "replicated"
    """replicated: every process holds whole weights (DistributedDataParallel). sharded: each holds a part of
    weights, gradients and optimizer state, and layers are gathered when they are computed (FSDP2, ZeRO-3).
    gathered: as sharded, but weights and gradients stay whole from the first micro-batch of a step to its
    end: less traffic, more memory. One process is always replicated. See docs/scaling.md."""
    shard: int | None = Field(default=None, gt=0)
    """Processes that share one copy of the weights, usually those of one node. None: all, or what
    parallel.replicate leaves."""
    replicate: int | None = Field(default=None, gt=0)
    """Copies of the weights, each spread over parallel.shard processes. None: 1, or what parallel.shard
    leaves."""
    sequence: int = Field(default=1, gt=0)
    """Processes that compute each micro-batch together, a slice of its columns each, so that they share the
    memory of its activations. Needs model.attention tiled or flex, and has to divide the attention heads.
    1: every process computes micro-batches of its own."""
    processes: int | None = Field(default=None, gt=0)
    """Refuse to start with another number of processes. None: any."""

    @model_validator(mode="after")
    def _shape_is_of_shards(self) -> Self:
        if self.mode == "replicated" and (self.shard or 1) > 1:
            raise ValueError(
                f"shard is {self.shard}, but with mode 'replicated' every process holds whole weights; set "
                "parallel.mode to 'sharded' or 'gathered', or leave shard out"
            )
        if None not in (self.shard, self.replicate, self.processes):
            made = (self.shard or 1) * (self.replicate or 1)
            if made != self.processes:
                raise ValueError(
                    f"shard {self.shard} x replicate {self.replicate} makes {made} processes, and processes "
                    f"is {self.processes}; leave one of the three out"
                )
        return self
