"""What is known of a step's tokens before it begins: a reference's log-probs, the highest entropies."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.trainer.batches import make_bodies, make_group
from tests.trainer.models import tiny_model
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from trainer import load_config
from trainer.check._local import check_model
from trainer.errors import ConfigurationError

KL = ("--loss.name", "ppo_clip", "--loss.kl_coefficient", "0.5")
LORA = ("--model.lora.rank", "4")


def trained_logprobs(model: Path, group: dict[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs and entropies of each sequence's tokens under a model, 0 where nothing is trained."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    logprobs, entropies = [], []
    for tokens, mask in zip(group["tokens"], group["masks"], strict=True):
        with torch.no_grad():
            plain = loaded(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        entropy = -(plain.exp() * plain).sum(-1)
        places = range(1, len(tokens))
        trained = [mask[place] != -100 for place in places]
        found = [float(plain[place - 1, tokens[place]]) for place in places]
        logprobs.append([0.0] + [value if on else 0.0 for value, on in zip(found, trained, strict=True)])
        entropies.append(
            [0.0] + [float(entropy[p - 1]) if on else 0.0 for p, on in zip(places, trained, strict=True)]
        )
    return logprobs, entropies


def groups_of(bodies: list[bytes]) -> list[list[dict[str, Any]]]:
    return [json.loads(body)["batch"] for body in bodies]


def body_of(groups: list[dict[str, Any]]) -> bytes:
    return json.dumps({"batch": groups}).encode()


def test_a_reference_computed_here_is_the_one_that_groups_could_bring(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(3)
    brought = [
        body_of([each | {"ref_logprobs": trained_logprobs(tiny_model_directory, each)[0]} for each in groups])
        for groups in groups_of(bodies)
    ]
    run(tiny_model_directory, tmp_path / "brought", brought, *KL, steps=3)
    run(tiny_model_directory, tmp_path / "base", bodies, *KL, "--loss.reference", "base", steps=3)
    named = ("--loss.reference", str(tiny_model_directory))
    run(tiny_model_directory, tmp_path / "named", bodies, *KL, *named, steps=3)
    found = [row["kl_ref"] for row in rows(tmp_path / "base")]
    assert found == pytest.approx([row["kl_ref"] for row in rows(tmp_path / "brought")], rel=1e-4, abs=1e-6)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[2] > 1e-4
    assert_equal_tensors(weights(tmp_path / "base/final"), weights(tmp_path / "named/final"))
    for name, tensor in weights(tmp_path / "brought/final").items():
        torch.testing.assert_close(weights(tmp_path / "base/final")[name], tensor, rtol=0, atol=2e-4)


def test_the_base_under_the_adapters_is_the_reference_without_a_second_copy(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    options = (*KL, *LORA, "--optimizer.learning_rate", "1e-2")
    run(tiny_model_directory, tmp_path / "base", make_bodies(4), *options, "--loss.reference", "base")
    named = ("--loss.reference", str(tiny_model_directory))
    run(tiny_model_directory, tmp_path / "named", make_bodies(4), *options, *named)
    assert [row["kl_ref"] for row in rows(tmp_path / "base")] == [
        row["kl_ref"] for row in rows(tmp_path / "named")
    ]
    assert rows(tmp_path / "base")[-1]["kl_ref"] > 1e-4
    adapters = "checkpoints/step-000004/adapter/adapter_model.safetensors"
    assert_equal_tensors(load_file(tmp_path / "base" / adapters), load_file(tmp_path / "named" / adapters))


def test_a_reference_with_fewer_tokens_is_refused(tiny_model_directory: Path, tmp_path: Path) -> None:
    other = tiny_model("llama")
    other.resize_token_embeddings(100)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match=r"loss\.reference .* knows 100 tokens, the policy \d+"):
        run(tiny_model_directory, tmp_path / "run", [], "--loss.reference", str(tmp_path / "other"))
    assert not (tmp_path / "run").exists()
    words = ("--loss.reference", str(tmp_path / "other"), "--model.path", str(tiny_model_directory))
    results, _ = check_model(load_config(None, words, environment={}))
    (found,) = [result for result in results if result.name == "reference"]
    assert "knows 100 tokens" in found.found


def gpt2_of_context(directory: Path, tokens: int) -> Path:
    config = GPT2Config(vocab_size=259, n_positions=tokens, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_a_reference_with_a_shorter_context_is_refused_before_anything_is_written(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    short = str(gpt2_of_context(tmp_path / "short", 64))
    with pytest.raises(ConfigurationError, match="has a context of 64 tokens, and sequences may have 2048"):
        run(tiny_model_directory, tmp_path / "run", [], "--loss.reference", short)
    assert not (tmp_path / "run").exists()
    options = ("--loss.reference", short, "--data.max_sequence_length", "64", *KL)
    run(tiny_model_directory, tmp_path / "run", make_bodies(1), *options, steps=1)
    assert rows(tmp_path / "run")[0]["kl_ref"] > 0


def test_a_reference_is_named_where_it_cannot_be_used(tiny_model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"loss\.reference '/nope' cannot be used"):
        run(tiny_model_directory, tmp_path / "run", [], "--loss.reference", "/nope")
    broken = AutoModelForCausalLM.from_pretrained(tiny_model_directory)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigurationError, match=r"loss\.reference .*its weights hold NaN or infinities"):
        run(tiny_model_directory, tmp_path / "run", [], "--loss.reference", str(tmp_path / "broken"))
    other = Path(shutil.copytree(tiny_model_directory, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    first, second, *_ = tokenizer["model"]["vocab"]
    texts = tokenizer["model"]["vocab"]
    texts[first], texts[second] = texts[second], texts[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigurationError, match="has another tokenizer than the policy"):
        run(tiny_model_directory, tmp_path / "elsewhere", [], "--loss.reference", str(other))


def test_only_the_tokens_of_highest_entropy_are_trained_on(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    """The KL of the others stays: every token has a reference far from the policy."""
    generator = random.Random(5)
    groups = [make_group(generator) for _ in range(3)]
    groups = [group | {"ref_logprobs": group["inference_logprobs"]} for group in groups]
    advantages, entropies = [], []
    for group in groups:
        advantages.append([[generator.uniform(-1, 1)] * len(tokens) for tokens in group["tokens"]])
        entropies.append(trained_logprobs(tiny_model_directory, group)[1])
    ranked = sorted((value for group in entropies for row in group for value in row if value), reverse=True)
    lowest = ranked[round(0.3 * len(ranked)) - 1]
    whole = body_of(
        [group | {"advantages": rows_of} for group, rows_of in zip(groups, advantages, strict=True)]
    )
    by_hand = body_of(
        [
            group
            | {
                "advantages": [
                    [a if e >= lowest - 1e-6 else 0.0 for a, e in zip(*pair, strict=True)]
                    for pair in zip(rows_of, entropy_of, strict=True)
                ]
            }
            for group, rows_of, entropy_of in zip(groups, advantages, entropies, strict=True)
        ]
    )
    penalty = ("--loss.kl_coefficient", "0.05", "--loss.kl_estimator", "k2")
    share = (*penalty, "--loss.top_entropy_share", "0.3")
    run(tiny_model_directory, tmp_path / "share", [whole], *share, steps=1)
    run(tiny_model_directory, tmp_path / "by hand", [by_hand], *penalty, steps=1)
    run(tiny_model_directory, tmp_path / "all", [whole], *penalty, steps=1)
    (ours,), (expected,), (everything,) = (rows(tmp_path / name) for name in ("share", "by hand", "all"))
    assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert ours["grad_norm"] != pytest.approx(everything["grad_norm"], rel=1e-2)
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def flat_bodies(count: int) -> list[bytes]:
    """Batches in which no sequence has an advantage."""
    generator = random.Random(0)
    return [body_of([make_group(generator, scores=[1.0] * 4) for _ in range(3)]) for _ in range(count)]


def test_an_entropy_bonus_alone_raises_the_entropy(tiny_model_directory: Path, tmp_path: Path) -> None:
    bonus = ("--loss.entropy_coefficient", "0.1", "--optimizer.learning_rate", "1e-2")
    run(tiny_model_directory, tmp_path, flat_bodies(6), *bonus, steps=6)
    found = rows(tmp_path)
    assert found[-1]["entropy"] > found[0]["entropy"] + 0.01
    assert [row["entropy_coefficient"] for row in found] == pytest.approx([0.1] * 6)
    assert found[0]["loss"] == pytest.approx(-0.1 * found[0]["entropy"], rel=1e-5)


def test_an_adaptive_coefficient_follows_its_target_and_outlives_a_resume(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = flat_bodies(6)
    options = ("--optimizer.learning_rate", "1e-2", "--loss.entropy_step", "0.01")
    run(tiny_model_directory, tmp_path / "probe", bodies[:1], "--loss.entropy_coefficient", "1e-9", steps=1)
    entropy = rows(tmp_path / "probe")[0]["entropy"]

    above = ("--loss.entropy_target", str(entropy + 1), "--loss.entropy_coefficient", "0.02")
    run(tiny_model_directory, tmp_path / "whole", bodies, *options, *above, steps=6)
    found = [row["entropy_coefficient"] for row in rows(tmp_path / "whole")]
    assert found == pytest.approx([0.02, 0.03, 0.04, 0.05, 0.06, 0.07])

    run(tiny_model_directory, tmp_path / "halves", bodies[:2], *options, *above, steps=2)
    for name in ("fixed", "anew"):
        shutil.copytree(tmp_path / "halves/checkpoints", tmp_path / name / "checkpoints")
    run(tiny_model_directory, tmp_path / "halves", bodies[2:], *options, *above, steps=6)
    assert_equal_tensors(weights(tmp_path / "halves/final"), weights(tmp_path / "whole/final"))

    for name, changed in (
        ("fixed", ("--loss.entropy_coefficient", "0.3", "--loss.entropy_target", "none")),
        ("anew", ("--loss.entropy_coefficient", "0.3", "--loss.entropy_target", str(entropy + 1))),
    ):
        names = ("--train.resume_changes", "loss.entropy_coefficient,loss.entropy_target")
        run(tiny_model_directory, tmp_path / name, bodies[2:4], *options, *changed, *names, steps=4)
        coefficients = [row["entropy_coefficient"] for row in rows(tmp_path / name)]
        assert coefficients == pytest.approx([0.3, 0.3 if name == "fixed" else 0.31])

    below = ("--loss.entropy_target", str(entropy - 1), "--loss.entropy_coefficient", "0.02")
    run(tiny_model_directory, tmp_path / "below", bodies[:3], *options, *below, steps=3)
    assert [row["entropy_coefficient"] for row in rows(tmp_path / "below")] == pytest.approx([0.02, 0, 0])


def test_how_a_step_is_cut_into_passes_changes_nothing(tiny_model_directory: Path, tmp_path: Path) -> None:
    options = (*KL, "--loss.reference", "base", "--loss.entropy_coefficient", "0.1")
    options += ("--loss.top_entropy_share", "0.4")
    for name, budget in (("one", "4096"), ("many", "40")):
        run(
            *(tiny_model_directory, tmp_path / name, make_bodies(2), *options),
            *("--data.tokens_per_micro_batch", budget),
            steps=2,
        )
    for ours, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "many"), strict=True):
        for key in ("loss", "grad_norm", "kl_ref", "entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-7), key
