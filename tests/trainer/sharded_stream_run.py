"""A model in shards over the processes of torch.distributed.run: process 0 saves what its stream yields."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from tests.trainer.models import tiny_model
from trainer.publish._weight_stream import WeightStream

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    model = tiny_model("llama", dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    held = model.model.norm.weight.to_local().numel()
    assert held < model.model.norm.weight.numel(), "every process holds a shard only"
    stream = WeightStream(model, dtype=torch.bfloat16, bucket_bytes=4096)
    if torch.distributed.get_rank() == 0:
        save_file({name: tensor for bucket in stream.buckets() for name, tensor in bucket}, Path(sys.argv[1]))
    else:
        stream.take_part()
    torch.distributed.barrier()
    # Without shutting the interpreter down. DTensor's caches keep the process group, and so gloo's threads,
    # beyond `destroy_process_group`; one that lets go of a tensor while Python shuts down aborts the process.
    os._exit(0)
