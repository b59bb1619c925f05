"""A loss and an advantage estimator of a user's own: the page's examples, and what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from atropos_client.journal import Journal
from tests.atropos_client.misbehaving_server import MisbehavingServer
from tests.forked import run_module
from tests.hostile.harness import script_api
from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from trainer.cli import main
from trainer.config import load_config
from trainer.errors import ConfigurationError
from trainer.extensions import AdvantageEstimator, GroupScores, Loss, advantage_estimator, loss
from trainer.losses import LossInputs
from trainer.options import ESTIMATOR_OPTIONS, LOSS_OPTIONS

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
NAMED = ("--model.path", "some/model", "--loss.name", "my_loss:sequence_clip")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with the modules of the page in it."""
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(text)
    assert {path.name for path in tmp_path.iterdir()} == {"my_loss.py", "my_advantages.py"}
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_files_of_the_page_name_both_with_their_options(directory: Path) -> None:
    files = re.findall(r"```yaml\n# run\.yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(files) == 2
    merged = yaml.safe_load(files[0]) | yaml.safe_load(files[1])
    (directory / "run.yaml").write_text(yaml.safe_dump(merged))
    path_before = list(sys.path)
    config = load_config(directory / "run.yaml", ["--loss.kl_coefficient", "0.5"], environment={})
    assert sys.path == path_before
    named = {
        "name": "my_loss:sequence_clip",
        "reduction": "sequence",
        "epsilon": 0.001,
        "kl_coefficient": 0.5,
        "kl_estimator": "k3",
        "kl_cap": None,
    }
    dumped = config.model_dump()["loss"]
    assert {name: dumped[name] for name in named} == named
    assert config.loss.needs_inference_logprobs
    assert config.loss.uses_temperature
    assert config.loss.bound.needs_ref_logprobs
    assert config.loss.bound.trains_without_advantage
    estimate = config.data.bound_estimator
    # The baseline is (1 * 30 + 0 * 10) / 40.
    assert estimate(GroupScores(scores=[1.0, 0.0], trained_tokens=[30, 10])) == [0.125, -0.375]


def test_the_loss_of_the_page_is_gspo(directory: Path) -> None:
    config = load_config(None, [*NAMED, "--loss.epsilon", "0.1"], environment={})
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(7, generator=generator, dtype=torch.float64)
    sampler = -torch.rand(7, generator=generator, dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    value, metrics = config.loss.bound(
        LossInputs(
            logprobs=logprobs.requires_grad_(),
            advantages=advantages[index],
            loss_mask=torch.ones(7),
            inference_logprobs=sampler,
            denominator=3 * index.bincount()[index],
            sequence_ids=index,
            sequence_count=3,
        )
    )
    expected, clipped, outside = 0.0, 0, 0
    for sequence, advantage in enumerate(advantages.tolist()):
        of_it = index == sequence
        ratio = math.exp((logprobs - sampler)[of_it].mean().item())
        bounded = min(max(ratio, 0.9), 1.1)
        has_gradient = ratio == bounded or (ratio > bounded) == (advantage < 0)
        expected -= min(ratio * advantage, bounded * advantage) / 3
        clipped += 0 if has_gradient else int(of_it.sum())
        outside += int(of_it.sum()) if ratio != bounded else 0
    assert value.item() == pytest.approx(expected)
    assert metrics["clipped"].item() == clipped
    assert 0 < clipped < outside  # some beyond a bound keep their gradient


def test_a_run_trains_with_both_and_goes_on_only_with_the_same(
    directory: Path, tiny_model_directory: Path
) -> None:
    words = (
        *("--loss.name", "my_loss:sequence_clip", "--data.advantage_estimator"),
        *("my_advantages:length_baseline", "--data.advantage_options.scale", "0.5"),
    )
    output = directory / "run"
    run(tiny_model_directory, output, make_bodies(1), *words, steps=1)
    row = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert "clipped" in row
    changed = (*words, "--loss.epsilon", "0.01", "--data.advantage_options.scale", "2")
    with pytest.raises(
        ConfigurationError, match=r"advantage_options: .*0\.5.* now(.|\n)*loss\.epsilon: 0\.0003 "
    ):
        run(tiny_model_directory, output, make_bodies(1, first_seed=1), *changed, steps=2)
    names = "loss.epsilon,data.advantage_options"
    named = (*changed, "--train.resume_changes", names)
    run(tiny_model_directory, output, make_bodies(1, first_seed=1), *named, steps=2)


def test_what_the_help_says_of_our_options_is_what_our_losses_and_estimators_take() -> None:
    assert {name: Loss.find(name).options for name in Loss.built_in} == LOSS_OPTIONS
    found = {name: AdvantageEstimator.find(name).options for name in AdvantageEstimator.built_in}
    assert found == ESTIMATOR_OPTIONS


def test_the_help_shows_the_options_of_ours_and_of_the_one_that_is_named(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["--help", *NAMED],
        [*NAMED, "--data.advantage_estimator=my_advantages:length_baseline", "-h"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["run", *words])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert (
            "--loss.epsilon float  (default: 0.0003)\n      my_loss:sequence_clip: The ratio of a seq" in text
        )
        assert "every built-in loss, my_loss:sequence_clip: Weight of the KL penalty" in text
        assert "--loss.epsilon_low float  (default: 0.2)\n      ppo_clip, decoupled_ppo, " in text
    assert "--data.advantage_options.scale float  (default: 1.0)" in text
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help", "--loss.name", "gone:x"])
    assert ended.value.code == 2
    assert "there is no module gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.name", "gone:f"], r"loss\.name: gone:f: there is no module gone, neither installed nor"),
        (["--loss.name", "my_loss.x:f"], r"my_loss\.x:f: there is no module my_loss\.x"),
        (["--loss.name", "my_loss:"], r"loss\.name: there is no loss 'my_loss:'"),
        (["--loss.name", "os:system()"], r"loss\.name: there is no loss 'os:system\(\)'"),
        (["--loss.name", "my_loss:clip"], r"the module my_loss has no clip"),
        (
            ["--loss.name", "my_loss:log_ratio"],
            r"my_loss:log_ratio is no loss, its type is function: put @trainer\.ext",
        ),
        (["--loss.name", "my_advantages:length_baseline"], r"is no loss, its type is AdvantageEstimator"),
        (
            ["--loss.name", "broken:f"],
            r"broken:f: importing broken failed: ZeroDivisionError: division by zero",
        ),
        (["--loss.name", "ends:f"], r"ends:f: importing ends failed: SystemExit: 3"),
        (["--loss.name", "needy:f"], r"needy:f: needy imports no_such_package, which is not installed"),
        ([*NAMED, "--loss.epsilon", "2"], r"loss\.epsilon: Input should be less than 1 \(found '2'\)"),
        (
            [*NAMED, "--loss.epsilon_low", "2"],
            r"loss\.epsilon_low: loss sequence_clip has no option epsilon_low",
        ),
        (
            ["--data.advantage_estimator", "my_loss:sequence_clip"],
            r"is no advantage estimator, its type is Loss",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_to_do(
    words: list[str], message: str, directory: Path
) -> None:
    (directory / "broken.py").write_text("1 / 0\n")
    (directory / "ends.py").write_text("raise SystemExit(3)\n")
    (directory / "needy.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigurationError, match=message) as refused:
        load_config(None, ["--model.path", "some/model", *words], environment={})
    assert len(str(refused.value).splitlines()) == 3  # what is wrong is one of them


def test_what_a_function_of_the_users_raises_is_told_as_theirs_with_its_place() -> None:
    @advantage_estimator()
    def broken(group: GroupScores, options: Any) -> list[float]:
        raise KeyError("k")

    with pytest.raises(
        ConfigurationError, match=r"estimator broken raised KeyError: 'k' \(.*test_extending\.py, line \d+\)"
    ):
        broken([1.0, 0.0])


def test_a_batch_waits_for_an_estimator_that_works(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a wrong configuration could not prepare is not set aside: the next start trains it."""
    (tmp_path / "short.py").write_text(
        "from trainer.extensions import advantage_estimator\n"
        "@advantage_estimator()\n"
        "def short(group, options):\n    return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    with Journal.open(output / "journal") as journal:
        journal.append(make_bodies(1)[0], served_version=0)
        journal.append(make_bodies(2)[1], served_version=0)
    with MisbehavingServer() as server:
        script_api(server, [])
        words = ["run", "--model.path", str(tiny_model_directory), "--train.output_dir", str(output)]
        words += ["--train.steps", "1", "--train.device", "cpu", "--atropos.url", server.url]
        broken = run_module("trainer.cli", *words, "--data.advantage_estimator", "short:short")
        assert broken.returncode == 2, broken.stderr
        assert "returned 1 advantages for a group of 4" in broken.stderr
        changes = ("--train.resume_changes", "data.advantage_estimator")
        mended = run_module("trainer.cli", *words, *changes)
    assert mended.returncode == 0, mended.stderr
    with Journal.read_only(output / "journal") as journal:
        assert journal.entry(1).outcome == "trained"


def test_a_loss_that_returns_something_else_is_refused_by_name() -> None:
    @loss()
    def per_token(inputs: LossInputs, options: Any) -> Any:
        return inputs.logprobs, {}

    inputs = LossInputs(logprobs=torch.zeros(3), advantages=torch.ones(3), loss_mask=torch.ones(3))
    with pytest.raises(
        ConfigurationError, match=r"per_token returned \(Tensor \[3\], \{\}\); a loss returns"
    ):
        per_token.bind(per_token.options())(inputs)
