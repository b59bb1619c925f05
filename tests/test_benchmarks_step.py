"""The benchmark of one step on a tiny random model: what it generates, compares, measures and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.step.__main__ import CONTENDERS, main, make_contenders, score
from benchmarks.step._cases import IGNORED, SAMPLER_NOISE, SHAPES, Case, make_case
from benchmarks.step._contender import Contender, Setting
from benchmarks.step._measure import measure, relative_difference
from benchmarks.step._memory import PeakMemory
from benchmarks.step._models import qwen3_600m_config, resolve_model
from benchmarks.step._ours import Floor, Ours
from benchmarks.step._padding import float32_gradients, micro_batched
from benchmarks.step._summary import bars_of, summarize
from benchmarks.step._work import arithmetic_of, peak_flops_of
from schemas import BatchReply

VOCABULARY = 259
TINY_CASES = ("tiny", "tiny-tree")


def flat_case(name: str, seed: int = 0) -> Case:
    return make_case(name, vocabulary=VOCABULARY, score=lambda tokens: [-2.0] * (len(tokens) - 1), seed=seed)


def setting_of(model: Path, scratch: Path, **changes: Any) -> Setting:
    setting = Setting(
        model=model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        micro_batch_tokens=96,  # several micro-batches for everyone
        activation_recomputation=False,
        optimizer_step=False,
        scratch=scratch,
    )
    return replace(setting, **changes)


def loaded(
    setting: Setting, names: tuple[str, ...] = CONTENDERS, packings: tuple[str, ...] = ("auto",)
) -> tuple[dict[str, Contender], list[dict[str, Any]]]:
    contenders, absent = make_contenders(setting, names, packings)
    return {contender.name: contender for contender in contenders}, absent


def scored_case(contenders: dict[str, Contender], name: str) -> Case:
    ours = contenders["ours"]
    assert isinstance(ours, Ours)
    return make_case(name, vocabulary=VOCABULARY, score=lambda tokens: score(ours, tokens))


# ----- the cases


@pytest.mark.parametrize(
    ("name", "prompt", "shortest", "longest"), [("a", 200, 16, 200), ("b", 16, 16, 200), ("c", 1000, 50, 50)]
)
def test_a_case_has_the_shape_it_is_named_for(name: str, prompt: int, shortest: int, longest: int) -> None:
    reply = BatchReply.model_validate_json(flat_case(name).body)
    assert not reply.rejected
    assert [group.sequence_count for group in reply.groups] == [8, 8]
    for group in reply.groups:
        assert len({tuple(tokens[:prompt]) for tokens in group.tokens}) == 1
        for tokens, mask in zip(group.tokens, group.masks, strict=True):
            assert shortest <= len(tokens) - prompt <= longest
            assert mask == [IGNORED] * prompt + tokens[prompt:]


def test_a_multi_turn_case_is_a_tree_with_untrained_replies_between_trained_turns() -> None:
    case = flat_case("d")
    for group in case.groups:
        shared = [
            next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
            for first in group["tokens"]
            for second in group["tokens"]
            if first is not second
        ]
        assert len(group["tokens"]) == 8
        assert min(shared) == 120, "the first turn branches right after the prompt"
        assert len(set(shared)) == 1 + 2 + 4, "one branching point at each of the tree's inner nodes"
    for row in case.rows:
        flips = sum(row.trained[place] != row.trained[place - 1] for place in range(1, len(row.trained)))
        assert flips == 5, "prompt, turn, reply, turn, reply, turn"
        assert row.prompt_length == 120


@pytest.mark.parametrize("name", [*TINY_CASES, "d"])
def test_the_counts_are_those_of_the_distinct_prefixes(name: str) -> None:
    case = flat_case(name)
    prefixes: set[tuple[int, ...]] = set()
    predictions: set[tuple[int, ...]] = set()
    for number, group in enumerate(case.groups):
        for tokens, mask in zip(group["tokens"], group["masks"], strict=True):
            for end in range(1, len(tokens) + 1):
                prefixes.add((number, *tokens[:end]))
                if end < len(tokens) and mask[end] != IGNORED:
                    predictions.add((number, *tokens[:end]))
    assert case.counts["unique_tokens"] == len(prefixes)
    assert case.counts["predictions"] == len(predictions)
    assert case.counts["attended_pairs"] == sum(len(prefix) - 1 for prefix in prefixes)
    assert case.counts["sequence_tokens"] == sum(len(row.tokens) for row in case.rows)
    assert case.counts["trained_tokens"] == sum(sum(row.trained) for row in case.rows)


def test_one_seed_makes_one_batch() -> None:
    assert flat_case("tiny", seed=3).body == flat_case("tiny", seed=3).body
    assert flat_case("tiny", seed=3).body != flat_case("tiny", seed=4).body


def test_every_sequence_has_an_advantage_and_sampler_log_probs_beside_the_models_own() -> None:
    for row in flat_case("tiny-tree").rows:
        assert row.advantage != 0.0
        for on, logprob in zip(row.trained, row.sampler_logprobs, strict=True):
            assert abs(logprob + 2.0) <= SAMPLER_NOISE if on else logprob == 1.0


def test_rows_are_cut_where_the_rectangle_would_pass_the_budget() -> None:
    rows = flat_case("tiny").rows
    parts = list(micro_batched(rows, 60))
    assert [row for part in parts for row in part] == rows
    assert len(parts) > 1
    for part in parts:
        assert len(part) * max(len(row.tokens) for row in part) <= 60


# ----- the contenders


@pytest.mark.parametrize("case_name", TINY_CASES)
@pytest.mark.parametrize("recompute", [False, True])
def test_all_trainers_compute_the_same_gradients(
    tiny_model_directory: Path, tmp_path: Path, case_name: str, recompute: bool
) -> None:
    setting = setting_of(tiny_model_directory, tmp_path, activation_recomputation=recompute)
    contenders, absent = loaded(setting, packings=("auto", "padded"))
    case = scored_case(contenders, case_name)
    rows = measure(list(contenders.values()), case, repeats=1, truth=float32_gradients(setting, case))
    by_name = {row["name"]: row for row in rows}
    trainers = {"ours", "ours-padded", "example-trainer", "example-trainer-stored"}
    assert trainers | {"floor", "floor-body", "padding"} <= by_name.keys()
    for name in (trainers | {"padding", "trl"}) & by_name.keys():
        assert by_name[name]["gradient_difference"] < 2e-5, name
        assert by_name[name]["loss"] == pytest.approx(by_name["padding"]["loss"], abs=2e-6), name
    assert abs(by_name["padding"]["loss"]) > 1e-4, "an all but empty loss would agree with anything"
    unique = case.counts["unique_tokens"]
    assert by_name["floor"]["computed_tokens"] == by_name["floor-body"]["computed_tokens"] == unique
    assert by_name["padding"]["computed_tokens"] > unique
    assert {row["name"] for row in absent} <= {"trl"}


def test_in_bfloat16_gradients_agree_to_its_precision(tiny_model_directory: Path, tmp_path: Path) -> None:
    setting = setting_of(tiny_model_directory, tmp_path, dtype=torch.bfloat16)
    contenders, _ = loaded(setting, ("ours", "padding", "example-trainer"))
    model = contenders["example-trainer"].model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in contenders["ours"].model.parameters()} == {torch.float32}
    case = scored_case(contenders, "tiny")
    rows = measure(list(contenders.values()), case, repeats=1, truth=float32_gradients(setting, case))
    differences = {row["name"]: row["gradient_difference"] for row in rows}
    assert 1e-5 < differences["padding"] < 0.1, "in bfloat16 padding is no truth either"
    assert 1e-5 < differences["ours"] < 1.5 * differences["padding"]
    assert differences["example-trainer"] < 0.2


def test_the_example_trainer_is_measured_with_and_without_its_recomputation(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    contenders, _ = loaded(
        setting_of(tiny_model_directory, tmp_path), ("example-trainer", "example-trainer-stored")
    )
    case = scored_case(contenders, "tiny")
    forwards = {}
    for name in ("example-trainer", "example-trainer-stored", "example-trainer"):
        contender = contenders[name]
        calls: list[None] = []
        layer = contender.model.get_submodule("model.layers.0.mlp")
        # Before, not after: recomputation ends as soon as the backward pass has what it needs.
        handle = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        contender.prepare(case)
        contender.step()
        handle.remove()
        forwards[name] = len(calls)
    assert forwards == {"example-trainer": 16, "example-trainer-stored": 8}, "8 micro-batches of 2"


def test_the_floor_applies_the_head_exactly_where_trained_tokens_are_predicted(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    contenders, _ = loaded(setting_of(tiny_model_directory, tmp_path), ("floor",))
    floor, case = contenders["floor"], scored_case(contenders, "tiny-tree")
    assert isinstance(floor, Floor)
    seen = []
    head = floor.model.get_submodule("lm_head")
    handle = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    floor.prepare(case)
    floor.step()
    handle.remove()
    assert sum(seen) == case.counts["predictions"]
    assert all(parameter.grad is not None for parameter in floor.model.parameters())


def test_a_wrong_gradient_is_seen() -> None:
    gradients = {"a": torch.ones(3), "b": torch.full((4,), 2.0)}
    assert relative_difference(gradients, gradients) == 0.0
    scaled = {name: gradient * 1.01 for name, gradient in gradients.items()}
    assert relative_difference(scaled, gradients) == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ValueError, match="different parameters: b"):
        relative_difference({"a": torch.ones(3)}, gradients)


def test_contenders_take_turns(tiny_model_directory: Path, tmp_path: Path) -> None:
    contenders, _ = loaded(setting_of(tiny_model_directory, tmp_path), ("floor", "padding"))
    said: list[str] = []
    case = scored_case(contenders, "tiny")
    rows = measure(
        list(contenders.values()),
        case,
        repeats=2,
        truth=None,
        progress=lambda line: said.append(line),
    )
    turns = [line.rpartition(", ")[2] for line in said if "warm-up" not in line]
    assert turns == [contender.label for contender in contenders.values()] * 2
    assert all(len(row["seconds"]) == 2 for row in rows)


def test_peak_memory_sees_what_was_allocated_and_freed_again() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    assert torch.ones(64 << 18).sum() > 0  # 64 MiB
    peak = memory.stop()
    if peak.above_start is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 60 << 20 < peak.above_start < 200 << 20
    memory.start()
    again = memory.stop().above_start
    assert again is not None
    assert again < 30 << 20, "the peak starts again"


# ----- arithmetic


def test_the_arithmetic_is_what_torch_counts(tiny_model_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_directory, attn_implementation="eager")
    arithmetic = arithmetic_of(model)
    tokens = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    # Eager attention computes all pairs, the future ones too; rotary angles are a product of its own.
    everywhere = {"unique_tokens": tokens, "predictions": tokens, "attended_pairs": tokens**2}
    assert counter.get_total_flops() == pytest.approx(arithmetic.step(everywhere) / 3, rel=2e-3)


def test_the_random_qwen3_has_the_published_size() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen3_600m_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 596_049_920
    # 2 FLOP a weight: the 0.44 billion in the layers' matrices, and the head.
    assert arithmetic_of(model).per_token == 2 * 440_401_920
    assert arithmetic_of(model).per_prediction == 2 * 1024 * 151_936


def test_peaks_are_known_by_the_devices_names() -> None:
    assert peak_flops_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops_of("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_of("GeForce") is None


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resolve_model("nowhere", tmp_path)


# ----- the command


def test_the_command_prints_a_table_and_writes_every_repeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.json"
    main(
        [
            *("--model", "tiny", "--cases", "tiny", "--dtype", "float32,bfloat16", "--repeats", "2"),
            *("--contenders", "floor,ours,padding,example-trainer", "--ours-packing", "auto,padded,knotted"),
            *("--micro-batch-tokens", "96", "--json", str(file)),
        ]
    )
    printed = capsys.readouterr().out
    assert "ours, packing padded" in printed
    assert "times the floor's time" in printed
    result = json.loads(file.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert [run["dtype"] for run in result["runs"]] == ["float32", "bfloat16"]
    for run in result["runs"]:
        rows = {row["name"]: row for row in run["contenders"]}
        assert set(rows) == {"floor", "ours", "ours-padded", "padding", "example-trainer", "ours-knotted"}
        assert [len(row["seconds"]) for row in rows.values()] == [2, 2, 2, 2, 2, 0]
        assert "data.packing" in rows["ours-knotted"]["status"]
        assert run["counts"] == flat_case("tiny").counts


def test_a_step_with_the_optimizer_reports_throughput_beside_the_published_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = main(
        [
            *("--model", "tiny", "--cases", "tiny-tree", "--dtype", "bfloat16", "--repeats", "1"),
            *("--micro-batch-tokens", "16384", "--activation-recomputation", "--optimizer-step"),
            *("--peak-tflops", "0.05"),
        ]
    )
    (run,) = result["runs"]
    assert [row["name"] for row in run["contenders"]] == ["ours"]
    ours = summarize(run)[0]
    assert ours.seconds is not None
    printed = capsys.readouterr().out
    assert f"not counted: {run['counts']['unique_tokens'] / ours.seconds:,.0f}" in printed
    assert f"{run['step_flop'] / ours.seconds / 0.05e12:.1%} MFU" in printed
    assert "11,900 tokens/s, 11.1% MFU" in printed


@pytest.mark.parametrize("words", [("--cases", "z"), ("--dtype", "float16"), ("--contenders", "us")])
def test_a_wrong_word_is_refused_with_the_allowed_ones(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(list(words))
    assert "choose from" in capsys.readouterr().err


def test_the_help_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for shape in SHAPES.values():
        assert shape.title in printed


# ----- the bars


def made_up_run(**seconds: float) -> dict[str, Any]:
    return {
        "case": "a",
        "dtype": "float32",
        "counts": {"trained_tokens": 100},
        "contenders": [
            {
                "name": name.replace("_", "-"),
                "label": name,
                "status": "ok",
                "seconds": [value, 0.9 * value, 1.2 * value],
                "others_share": [0.0, 0.0, 0.01],
                "computed_tokens": 1,
                "peak_bytes": [int(value * 2**30)],
                "peak_total_bytes": [None],
                "gradient_difference": None,
            }
            for name, value in seconds.items()
        ],
    }


def test_the_bars_hold_us_to_the_example_trainer_as_it_ships() -> None:
    run = made_up_run(floor=1.0, ours=1.1, example_trainer=9.0, example_trainer_stored=7.0)
    time, memory, floor = bars_of(run)
    assert (time.found, time.met) == ("8.18", True)
    assert (memory.found, memory.met) == ("0.12", True)
    assert (floor.found, floor.met) == ("1.10", True)
    slow = made_up_run(floor=1.0, ours=1.2, example_trainer=9.0, example_trainer_stored=12.0)
    assert [bar.met for bar in bars_of(slow)] == [False, True, False]


def test_memory_is_compared_with_both_recomputing_activations_where_that_was_measured() -> None:
    run = made_up_run(ours=3.0, recomputing=1.5, example_trainer=2.0)
    memory = bars_of(run)[-1]
    assert memory.found == "0.75"
    assert "both recomputing" in memory.text


def test_the_median_of_the_repeats_counts() -> None:
    floor, ours = summarize(made_up_run(floor=1.0, ours=2.0))
    assert (floor.seconds, ours.seconds, ours.times_floor) == (1.0, 2.0, 2.0)
    assert ours.trained_tokens_per_second == 50.0
    assert floor.trained_tokens_per_second is None
