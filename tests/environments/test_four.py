"""Four kinds of environments at once, beside the real API, inference server and trainer, for three steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from atropos_client import parse_batch
from atropos_client.journal import Journal
from schemas import ScoredGroup
from tests.conftest import RunningInferenceServer
from tests.environments.beside import api_and_environments
from tests.environments.four import GROUP_SIZE, NAMES, token_advantages
from tests.trainer.runs import rows
from trainer import RunSummary, load_config
from trainer.run.build import build_trainer
from trainer.samples.advantages import group_norm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 3


@dataclass(frozen=True)
class Finished:
    """A run beside all four."""

    summary: RunSummary
    rows: list[dict[str, Any]]
    batches: list[dict[str, ScoredGroup]]
    """Of each batch, one group of each environment by its name."""


@pytest.fixture(scope="module")
def finished(
    tiny_model_directory: Path,
    shared_inference_server: RunningInferenceServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """Three steps; nothing is published, so that all batches come from the weights on the disk."""
    output = tmp_path_factory.mktemp("four") / "run"
    words = (shared_inference_server.url, str(tiny_model_directory))
    log = output.parent / "log"
    with api_and_environments("tests.environments.four", *words, log=log) as api:
        config = load_config(
            None,
            [
                *("--model.path", str(tiny_model_directory), "--atropos.url", api),
                *("--atropos.batch_size", str(GROUP_SIZE * len(NAMES)), "--atropos.max_token_length", "256"),
                *("--atropos.batch_timeout", "240", "--atropos.heartbeat_every", "10"),
                *("--train.output_dir", str(output), "--train.steps", str(STEPS)),
                *("--train.device", "cpu", "--train.mixed_precision", "no"),
                *("--optimizer.learning_rate", "0", "--journal.prune", "false"),
            ],
            environment={},
        )
        summary = build_trainer(config).run()
    with Journal.read_only(output / "journal") as journal:
        replies = [parse_batch(journal.read(number).body) for number in range(1, STEPS + 1)]
    return Finished(
        summary,
        rows(output),
        [{NAMES[group.env_id or 0]: group for group in reply.groups} for reply in replies],
    )


def test_all_are_trained_and_nothing_is_set_aside(finished: Finished) -> None:
    assert (finished.summary.step, finished.summary.stopped_early) == (STEPS, None)
    assert all(sorted(batch) == sorted(NAMES) for batch in finished.batches)
    assert [row["set_aside_groups_total"] for row in finished.rows] == [0] * STEPS


def test_masks_cover_what_the_model_wrote_in_each_turn(finished: Finished) -> None:
    for batch in finished.batches:
        for name, group in batch.items():
            turns = [sum(on for on, _ in groupby(row, lambda mask: mask != -100)) for row in group.masks]
            assert turns == [2 if name == "two_turns" else 1] * GROUP_SIZE


def test_log_probs_are_the_trainers_own_where_there_are_any(finished: Finished) -> None:
    for row, batch in zip(finished.rows, finished.batches, strict=True):
        assert [name for name, group in batch.items() if group.inference_logprobs is None] == ["openai_only"]
        with_logprobs = [computed_tokens(group) for name, group in batch.items() if name != "openai_only"]
        assert row["mismatch_tokens"] == sum(with_logprobs)
        assert row["mismatch_difference"] < 1e-4


def computed_tokens(group: ScoredGroup) -> int:
    """Count trained tokens, but of a sequence whose score is exactly the group's mean: it is not computed."""
    counts = [sum(mask != -100 for mask in masks) for masks in group.masks]
    if group.advantages:
        return sum(counts)
    return sum(count for count, advantage in zip(counts, group_norm(group.scores), strict=True) if advantage)


def test_the_loss_is_made_of_the_environments_own_token_advantages(
    finished: Finished, tiny_model_directory: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_directory, dtype=torch.float32).eval()
    for row, batch in zip(finished.rows, finished.batches, strict=True):
        assert batch["token_advantages"].advantages == list(
            map(token_advantages, batch["token_advantages"].masks)
        )
        trained = sum(group.trained_token_count for group in batch.values())
        whole = sum(weighted_cross_entropy(model, group) for group in batch.values())
        assert row["loss"] == pytest.approx(whole / trained, rel=1e-4, abs=1e-5)


def weighted_cross_entropy(model: Any, group: ScoredGroup) -> float:
    """-log-prob times advantage over the trained tokens of a group, one token at a time."""
    of_scores = group_norm(group.scores)
    total = 0.0
    for index, (tokens, masks) in enumerate(zip(group.tokens, group.masks, strict=True)):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        for column, mask in enumerate(masks):
            if mask != -100:
                own = group.advantages[index][column] if group.advantages else of_scores[index]
                total -= float(logprobs[column - 1, mask]) * own
    return total
