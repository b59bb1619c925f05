"""Measures the time of a checkpoint of a 135M model, and the cost of its checksums.

    python -m benchmarks.checkpoint

A random model of SmolLM2-135M's shape and AdamW's moments for it, 1.6 GB together: written, flushed, read
back and renamed; then verified as a start does it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from local_stack.command import positive
from trainer.checkpoints.format import (
    CheckpointState,
    trained_parameter_names,
    verify_checkpoint,
    write_checkpoint,
)
from trainer.checkpoints.manifest import forget_cached_pages, verify_files, write_manifest
from trainer.model.base_checkpoint import read_base


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=positive, default=3, help="repetitions; medians are shown")
    parser.add_argument("--directory", type=Path, default=None, help="on the file system to measure")
    times = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=times.directory) as scratch:
        measure(Path(scratch), times.times)


def measure(scratch: Path, times: int) -> None:
    """Write the same checkpoint several times."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = CheckpointState(
        step=1,
        policy_version=1,
        batches=1,
        counters={},
        normalizer={},
        stored_dtype="bfloat16",
        parameter_names=trained_parameter_names(model),
    )
    model.save_pretrained(scratch / "base")
    base = read_base(str(scratch / "base"))
    path = scratch / "checkpoints/step-000001"

    def write() -> None:
        write_checkpoint(
            path,
            model=model,
            base=base,
            optimizer=optimizer,
            state=state,
            configuration={},
            versions={},
        )

    def read_back() -> None:
        forget_cached_pages(path)
        verify_files(path)

    show("checkpoint written, flushed, read back", times, write)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    show(
        "  of it: checksums while the bytes are hot",
        times,
        lambda: write_manifest(path, configuration={}, versions={}),
    )
    show("  of it: reading back and comparing", times, read_back)
    show("verified and opened at a start", times, lambda: verify_checkpoint(path))
    sys.stdout.write(
        f"{size / 1e9:.2f} GB, {sum(each.numel() for each in model.parameters()) / 1e6:.0f}M weights\n"
    )


def show(what: str, times: int, action: Callable[[], object]) -> None:
    """Print the median of several runs."""
    seconds = []
    for _ in range(times):
        started = time.monotonic()
        action()
        seconds.append(time.monotonic() - started)
    sys.stdout.write(
        f"{what:45} {statistics.median(seconds):6.2f} s   (of {min(seconds):.2f} to {max(seconds):.2f})\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
