"""The page and the picture of the benchmark are made from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import CASES, PAGE, main, read_runs, replace_between, sections

MARKERS = ("summary", "step", "ablation", "gradients", "throughput")
PNG = b"\x89PNG\r\n\x1a\n"


def contender(name: str, seconds: float, *, others: float = 0.0) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.replace("-", " "),
        "status": "ok",
        "seconds": [seconds] * 3,
        "others_share": [0.01, others, 0.0],
        "prepare_seconds": 0.1,
        "computed_tokens": 1000,
        "loss": 0.5,
        "peak_bytes": [int(seconds * 2**30)] * 3,
        "peak_total_bytes": [int(seconds * 2**30)] * 3,
        "gradient_difference": 1e-6,
    }


def results(directory: Path, name: str, *contenders: dict[str, Any], **changes: Any) -> Path:
    run = {
        "case": "a",
        "title": "2 x 8, prompt 200",
        "dtype": "float32",
        "model": "demo",
        "device": "cpu",
        "optimizer_step": False,
        "step_flop": 1e12,
        "peak_flops": None,
        "counts": {
            "groups": 2,
            "sequences": 16,
            "sequence_tokens": 4000,
            "unique_tokens": 1200,
            "trained_tokens": 900,
        },
        "contenders": list(contenders),
    }
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "torch": "2", "date": "2026-01-01"}
    file = directory / name
    file.write_text(json.dumps({"benchmark": "step", "machine": machine, "runs": [run | changes]}))
    return file


def page(directory: Path) -> Path:
    file = directory / "page.md"
    file.write_text("before\n" + "".join(f"<!-- {m} -->old<!-- /{m} -->\nkept\n" for m in MARKERS))
    return file


def test_tables_and_picture_are_written_between_the_markers(tmp_path: Path) -> None:
    step = results(
        tmp_path,
        "1.json",
        contender("floor", 1, others=0.3),
        contender("ours", 1.1),
        contender("example-trainer", 11),
    )
    ablation = results(tmp_path, "2.json", contender("ours", 1), contender("ours-padded", 5), case="b")
    throughput = results(tmp_path, "3.json", contender("ours", 2), optimizer_step=True, peak_flops=1e13)
    untimed = contender("ours", 1) | {"seconds": [], "others_share": [], "gradient_difference": 0.15}
    gradients = results(tmp_path, "4.json", untimed, dtype="bfloat16")
    target, picture = page(tmp_path), tmp_path / "picture.png"
    main(
        [
            *map(str, (step, ablation, throughput, gradients)),
            *("--page", str(target)),
            *("--cases", str(target)),
            "--picture",
            str(picture),
        ],
    )
    text = target.read_text()
    assert "old" not in text
    assert text.count("kept") == len(MARKERS)
    assert "| a: 2 x 8, prompt 200 | float32 | **1.10** | 10.0x |  |  |  | 1.10 | 0.10 | 3 of 3 met |" in text
    assert "| b | float32 | padded | 5.00 | 1,000 | 5.00 | 5.00 |" in text
    assert "| a | bfloat16 | 1.5e-01 |" in text
    assert "5.0% MFU at 1 TFLOP a step; 2.0 GiB in all" in text
    assert "a CPU, 2 cores, 8.0 GiB, torch 2, 2026-01-01; medians of 3" in text
    assert text.count("**disturbed**: other processes took up to 30% of the cores") == 1
    assert picture.read_bytes().startswith(PNG)


def test_a_later_file_replaces_an_earlier_one(tmp_path: Path) -> None:
    old = results(tmp_path, "1.json", contender("ours", 9))
    new = results(tmp_path, "2.json", contender("ours", 3))
    (run,) = read_runs([old, new])
    assert run["contenders"][0]["seconds"] == [3, 3, 3]


def test_other_benchmarks_results_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert read_runs([other]) == []
    with pytest.raises(SystemExit, match="no results"):
        main([str(other)])


def test_a_page_without_the_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- step -->"):
        replace_between("nothing here", "step", [])


def test_the_performance_page_shows_the_results_that_are_kept() -> None:
    files = sorted((PAGE.parent.parent / "benchmarks" / "results").glob("*.json"))
    for marker, lines in sections(read_runs(files)).items():
        text = (CASES if marker == "step" else PAGE).read_text()
        assert replace_between(text, marker, lines) == text, "run: python -m benchmarks.report"
