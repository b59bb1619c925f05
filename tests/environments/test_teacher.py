"""A student learns from a teacher through the real API: its KL divergence to the teacher falls by half."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.environments.beside import api_and_environments
from tests.environments.teacher import GROUP_SIZE, random_texts
from tests.trainer.runs import rows
from trainer import load_config
from trainer.run.build import build_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 8


def divergence(student: Path, teacher: Path) -> float:
    """Mean KL(teacher ‖ student) over the whole vocabulary, on texts that nobody trained on."""
    texts = torch.tensor(random_texts(-1, 259, count=8))
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(each)(texts).logits.log_softmax(-1)
            for each in (student, teacher)
        )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def teach(directory: Path) -> None:
    """Train the model in a directory to say the first 32 tokens only, whatever it reads."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        texts = torch.tensor(random_texts(step, 259, count=8))
        logprobs = model(texts).logits.log_softmax(-1)
        (-logprobs[..., :32].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


@pytest.mark.parametrize("mode", ["forward_kl", "reverse_kl"])
def test_the_students_distance_to_the_teacher_falls_by_half(
    mode: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_model_directory, tmp_path / "teacher")
    teach(teacher)
    before = divergence(tiny_model_directory, teacher)

    log = tmp_path / "log"
    with api_and_environments("tests.environments.teacher", str(teacher), log=log) as api:
        config = load_config(
            None,
            [
                *("--model.path", str(tiny_model_directory), "--atropos.url", api),
                *("--atropos.batch_size", str(8 * GROUP_SIZE), "--atropos.max_token_length", "256"),
                *("--atropos.batch_timeout", "100", "--distillation.mode", mode),
                *("--train.output_dir", str(tmp_path / "run"), "--train.steps", str(STEPS)),
                *("--train.device", "cpu", "--train.mixed_precision", "no"),
                *("--optimizer.learning_rate", "2e-2"),
            ],
            environment={},
        )
        build_trainer(config).run()
    found = rows(tmp_path / "run")
    assert [row["set_aside_groups_total"] for row in found] == [0] * STEPS
    assert found[-1]["kl_teacher"] < found[0]["kl_teacher"] / 2
    if mode == "forward_kl":  # the other says nothing of what lies outside of the candidates
        assert divergence(tmp_path / "run/final", teacher) < before / 2
