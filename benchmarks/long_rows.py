"""Memory that activations take for a token, where several processes share a row (parallel.sequence).

    python -m benchmarks.long_rows --json long_rows.json

Measured: the peak of a forward and backward pass over one row, above weights and gradients, of a small random
model on the CPU with recomputed activations, in float32; the fullest of the processes counts.

Arithmetic, for rows and models beyond this machine: what grows with the number of layers. That is the input
of each layer, kept for recomputing it: 4 bytes x hidden size x layers, since bfloat16 autocast leaves it in
float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks._machine import describe, machine
from benchmarks.balance import QWEN3_8B
from benchmarks.step._memory import PeakMemory
from local_stack.command import positive
from local_stack.commands import free_addresses
from trainer.model.attention import TILED, register_backends
from trainer.model.lm_head import LogitTransform
from trainer.model.sequence_parallel import SequenceGroup, make_sequence_group
from trainer.model.token_logprobs import token_logprobs
from trainer.packing import MicroBatch, pack
from trainer.samples.sample import Sample

ROWS = (8_192, 32_768, 131_072)
SMALL = Qwen3Config(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    attn_implementation=TILED,
)
TRAINED = 256
"""Last tokens of the row."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measure, compute, print, and return what `--json` writes; one that is measured prints its peak."""
    options = _parser().parse_args(arguments)
    if "RANK" in os.environ:
        print(json.dumps(peak_bytes(options.row)))
        return None
    result: dict[str, Any] = {
        "benchmark": "long_rows",
        "machine": machine(),
        "measured": [
            {"row": options.row, "processes": count, "bytes_per_token": _measured(count, options.row)}
            for count in options.processes
        ],
        "layer_inputs_of_the_measured": layer_inputs(SMALL),
        "arithmetic": [
            {"row": row, "processes": count, "bytes": layer_inputs(QWEN3_8B) * row / count}
            for row in ROWS
            for count in (1, 2, 4, 8)
        ],
    }
    _show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def layer_inputs(config: Qwen3Config) -> int:
    """Bytes a token of the inputs of all layers."""
    return 4 * int(config.hidden_size) * int(config.num_hidden_layers)


def peak_bytes(row: int) -> int:
    """Compute a row, as one of the processes that share it, and return the peak above what stood before."""
    torch.set_num_threads(1)
    group = None
    if int(os.environ["WORLD_SIZE"]) > 1:
        distributed.init_process_group("gloo")
        group = make_sequence_group(distributed.get_world_size(), distributed.get_rank())
    register_backends()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(SMALL)
    model.activation_checkpointing_enable()
    model.train()
    _compute(model, _row(TRAINED + 1), group)  # libraries are loaded, and there are gradients
    batch = _row(row)
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    _compute(model, batch, group)
    peak = memory.stop().above_start
    if group is not None:
        distributed.destroy_process_group()
    return peak or 0


def _compute(model: torch.nn.Module, batch: MicroBatch, group: SequenceGroup | None) -> None:
    scores = token_logprobs(model, batch, use_temperature=False, head=LogitTransform(), group=group)
    scores.logprobs.sum().backward()


def _row(length: int) -> MicroBatch:
    mask = torch.zeros(length)
    mask[-TRAINED:] = 1
    sample = Sample(
        tokens=torch.randint(SMALL.vocab_size, (length,)),
        loss_mask=mask,
        advantages=mask,
        inference_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        score=0.0,
        env_id=0,
        group_index=0,
    )
    (batch,) = pack([sample], [1.0], packing="prefix_tree", tokens_per_micro_batch=length)
    return batch


def _measured(count: int, row: int) -> float:
    """Bytes a token of the row, in the fullest of `count` processes."""
    (address,) = free_addresses(1)
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": address.host, "MASTER_PORT": str(address.port)}
    # The C library keeps what is freed below this size, which would count as used.
    together["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    command = [sys.executable, "-m", "benchmarks.long_rows", "--row", str(row)]
    processes = [
        subprocess.Popen(  # noqa: S603 - this program
            command, env=os.environ | together | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{count} processes: one failed, see above")
    return max(json.loads(each.splitlines()[-1]) for each in printed) / row


def _show(result: dict[str, Any]) -> None:
    console = Console()
    measured = Table(title=f"Measured: {SMALL.num_hidden_layers} layers, hidden size {SMALL.hidden_size}")
    for name in ("row", "processes", "bytes a token", "of it layer inputs"):
        measured.add_column(name, justify="right")
    for each in result["measured"]:
        count = each["processes"]
        inputs = result["layer_inputs_of_the_measured"] / count
        measured.add_row(f"{each['row']:,}", str(count), f"{each['bytes_per_token']:,.0f}", f"{inputs:,.0f}")
    console.print(measured)
    computed = Table(title="Arithmetic: layer inputs of Qwen3-8B, GB for each process")
    for name in ("row", *(f"{count} processes" for count in (1, 2, 4, 8))):
        computed.add_column(name, justify="right")
    for row in ROWS:
        sizes = [each["bytes"] / 1e9 for each in result["arithmetic"] if each["row"] == row]
        computed.add_row(f"{row:,}", *(f"{size:.1f}" for size in sizes))
    console.print(computed)
    console.print(describe(result["machine"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", type=positive, default=ROWS[0], help="tokens of the row that is measured")
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


if __name__ == "__main__":
    main()
