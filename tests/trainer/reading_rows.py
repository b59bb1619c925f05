"""One of several processes that load models by their own rows, and each beside it whole.

Run by `test_own_rows`; fails where the two differ in a bit, or where the rows were not read alone.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate.utils import set_seed
from torch import distributed
from torch.distributed.tensor import DTensor

from trainer.config import ParallelSettings, load_config
from trainer.errors import ConfigurationError
from trainer.model.load import load_policy
from trainer.model.sharding import Spread, make_spread
from trainer.run.data_parallel import freeze_unused_parameters

CPU = torch.device("cpu")


def compare(directory: str, spread: Spread, *options: str) -> None:
    config = load_config(None, ["--model.path", directory, *options], environment={})
    set_seed(0)
    ours = load_policy(config.model, config.data, rows_only=True)
    assert ours.loaded.rows is not None, "loaded whole"
    assert any(parameter.is_meta for parameter in ours.model.parameters())
    freeze_unused_parameters(ours.loaded.tested)
    ours.loaded.spread_over(spread, CPU)
    set_seed(0)
    theirs = load_policy(config.model, config.data)
    freeze_unused_parameters(theirs.model)

    assert (ours.base_weights, ours.limits) == (theirs.base_weights, theirs.limits)
    assert ours.model.training == theirs.model.training
    found, expected = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert list(found) == list(expected)
    for name, whole in expected.items():
        parameter = found[name]
        assert isinstance(parameter, DTensor), name
        assert parameter.requires_grad == whole.requires_grad, name
        first, past = spread.own_rows(parameter)
        rows = parameter.detach().to_local()
        assert rows.dtype == whole.dtype, name
        assert torch.equal(rows, whole.detach()[first:past]), name
    buffers = dict(ours.model.named_buffers())
    assert buffers.keys() == dict(theirs.model.named_buffers()).keys()
    for name, buffer in theirs.model.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name


def main(words: list[str]) -> None:
    distributed.init_process_group("gloo")
    spread = make_spread(
        ParallelSettings(mode="sharded"),
        processes=distributed.get_world_size(),
        rank=int(os.environ["RANK"]),
        device=CPU,
    )
    no_numbers, *directories = words
    for directory in directories:
        compare(directory, spread)
    compare(directories[0], spread, "--model.lora.rank", "4")
    refused = load_policy(
        load_config(None, ["--model.path", no_numbers], environment={}).model,
        load_config(None, ["--model.path", no_numbers], environment={}).data,
        rows_only=True,
    )
    try:
        refused.loaded.spread_over(spread, CPU)
    except ConfigurationError as error:
        assert "cannot be trained" in str(error)  # noqa: PT017 - a program of its own
    else:
        raise AssertionError("weights that are no numbers were taken")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
