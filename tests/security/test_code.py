"""A stranger's model, checkpoint, journal, recording or configuration: reading it runs nothing of it."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from atropos_client import AtroposClientError
from atropos_client.journal import Journal
from local_stack.inference.errors import CheckpointMismatch
from local_stack.inference.weights import read_checkpoint as read_served_weights
from tests.forked import run_module
from tests.test_architecture import ROOMS, ROOT
from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from trainer.check._local import check_model
from trainer.checkpoints.format import verify_checkpoint
from trainer.checkpoints.manifest import read_manifest, write_manifest
from trainer.checkpoints.retention import find_newest_whole
from trainer.config import load_config
from trainer.errors import ConfigurationError, DataError, TrainerError
from trainer.model.load import load_policy
from trainer.sources.replay import ReplaySource

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "os.system", "os.popen", "torch.load", "numpy.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pickle.load", "pickle.loads"),
    *("pickle.Unpickler", "torch.jit.load", "torch.hub.load", "importlib.reload", "subprocess.getoutput"),
}
FORBIDDEN_ARGUMENTS = {"shell": True, "verify": False, "trust_remote_code": True, "weights_only": False}
MAY_IMPORT = {("trainer/publish/engines/vllm/nccl_sender.py", "pickle")}
"""It writes one, of CUDA handles, for a server that trusts us; nothing here reads one."""


def sources() -> list[Path]:
    rooms = (*ROOMS, "inference_plugins", "examples")
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def offences(source: str, name: str = "") -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for top in {each.partition(".")[0] for each in names} & FORBIDDEN_MODULES:
                if (name, top) not in MAY_IMPORT:
                    yield f"{name}:{node.lineno} imports {top}"
        if isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"{name}:{node.lineno} calls {called}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_ARGUMENTS and value is FORBIDDEN_ARGUMENTS[keyword.arg]:
                    yield f"{name}:{node.lineno} passes {keyword.arg}={value}"


def test_nothing_in_the_source_unpickles_evaluates_or_trusts() -> None:
    assert len(sources()) > 150
    found = [
        offence
        for path in sources()
        for offence in offences(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from dill import loads", "torch.load(path)", "eval(text)", "yaml.load(text)"),
        *("run(words, shell=True)", "Client(verify=False)", "from_pretrained(path, trust_remote_code=True)"),
    ],
)
def test_the_scan_of_the_source_finds_what_it_looks_for(source: str) -> None:
    assert len(list(offences(source))) == 1


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def bomb(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


@pytest.fixture(scope="module")
def finished_run(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    run(tiny_model_directory, output, make_bodies(2), steps=2)
    return output


@pytest.fixture(scope="module")
def finished_adapter_run(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished-adapter")
    run(tiny_model_directory, output, make_bodies(2), "--model.lora", "{rank: 2}", steps=2)
    return output


def test_the_bomb_goes_off_where_it_is_unpickled(bomb: bytes, marker: Path) -> None:
    pickle.loads(bomb)  # noqa: S301 - to see that the other tests can fail
    assert marker.exists()


def load_model(directory: Path) -> None:
    words = ["--model.path", str(directory)]
    config = load_config(None, words, environment={})
    check_model(config)
    load_policy(config.model, config.data)


MODEL_FILES = (
    *("model.safetensors", "pytorch_model.bin", "model.bin", "model.pt", "training_args.bin", "vocab.pkl"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json", "generation_config.json"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "adapter_model.bin"),
)


@pytest.mark.parametrize("without_weights", [False, True], ids=["beside the weights", "in their place"])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_pickle_in_a_model_directory_never_runs(
    name: str, without_weights: bool, bomb: bytes, marker: Path, tiny_model_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    if without_weights:
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(bomb)
    # Whatever else it finds wrong: some of these files are not looked at, others are needed.
    with suppress(TrainerError, ValueError, OSError, TypeError, UnicodeDecodeError):
        load_model(model)
    with suppress(CheckpointMismatch):
        read_served_weights(model)
    assert not marker.exists()


def test_a_tokenizer_class_that_reads_pickles_is_not_made_to(
    bomb: bytes, marker: Path, tiny_model_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    for name in ("vocab.pkl", "vocab.bin", "vocab.txt", "vocab.json", "merges.txt"):
        (model / name).write_bytes(bomb)
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "TransfoXLTokenizer"}')
    with suppress(TrainerError, ValueError, OSError, TypeError, AttributeError):
        load_model(model)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_model_brings_along_is_not_run_unless_asked_for(
    file: str, marker: Path, tiny_model_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    (model / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    )
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    content = json.loads((model / file).read_text())
    content |= {
        "auto_map": dict.fromkeys(classes, "evil.Evil"),
        "model_type": "evil",
        "tokenizer_class": "Evil",
    }
    content["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    (model / file).write_text(json.dumps(content))
    with suppress(TrainerError, ValueError, OSError, KeyError):
        load_model(model)
    assert not marker.exists()


def resume(output: Path, model: Path, *words: str) -> None:
    run(model, output, make_bodies(3)[2:], *words, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("checksums_match", [False, True], ids=["damaged", "with new checksums"])
def test_a_pickle_in_a_checkpoint_never_runs(
    adapters: bool,
    checksums_match: bool,
    bomb: bytes,
    marker: Path,
    finished_run: Path,
    finished_adapter_run: Path,
    tiny_model_directory: Path,
    tmp_path: Path,
) -> None:
    """In the place of every file, and beside every file under the names that pickles have."""
    whole = finished_adapter_run if adapters else finished_run
    words = ("--model.lora", "{rank: 2}") if adapters else ()
    files = [p.relative_to(whole) for p in (whole / "checkpoints/step-000002").rglob("*") if p.is_file()]
    for name in files:
        if name.name == "README.md":
            continue
        output = shutil.copytree(whole, tmp_path / "run")
        shutil.rmtree(output / "checkpoints/step-000000", ignore_errors=True)
        place = output / name
        place.unlink()
        renamed = {".safetensors": (".bin", ".pt", ".pkl", ".pth")}.get(place.suffix, ())
        for suffix in ("same", *renamed):
            (place if suffix == "same" else place.with_suffix(suffix)).write_bytes(bomb)
            if checksums_match and place.name != "manifest.json":
                renew_manifest(output / "checkpoints/step-000002")
            with suppress(TrainerError, ValueError, OSError):
                find_newest_whole(output / "checkpoints", verify_checkpoint)
            with suppress(TrainerError, ValueError, OSError, pickle.UnpicklingError):
                if place.suffix == ".safetensors":  # the others end before anything is loaded
                    resume(output, tiny_model_directory, *words)
            place.unlink(missing_ok=True)
            assert not marker.exists(), (name, suffix)
        shutil.rmtree(output)


def renew_manifest(checkpoint: Path) -> None:
    """Let the manifest name the files as they are now, so that nothing is found before it is read."""
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, configuration=manifest.configuration, versions=manifest.versions)


def test_a_pickle_in_the_place_of_a_journal_or_a_recording_never_runs(
    bomb: bytes, marker: Path, tmp_path: Path
) -> None:
    (tmp_path / "journal").mkdir()
    for name in ("journal.sqlite3", "journal.sqlite3-wal"):
        (tmp_path / "journal" / name).write_bytes(bomb)
    for opened in (Journal.read_only, Journal.open):
        with suppress(AtroposClientError):
            opened(tmp_path / "journal").close()
    recording = tmp_path / "groups.jsonl"
    recording.write_bytes(bomb + b"\n" + b'{"deep":' * 100_000 + b"\n" + json.dumps({"reply": None}).encode())
    with pytest.raises(ConfigurationError, match="its first line is no JSON object"):
        ReplaySource([recording], batch_size=4)
    recording.write_bytes(b'{"reply": null}\n' + recording.read_bytes())
    source = ReplaySource([recording], batch_size=4)
    with pytest.raises(ConfigurationError, match="there is no batch to replay"):
        source.require_batches()
    source.start()
    with pytest.raises(DataError, match="there is no batch to replay"):
        source.get(1.0)
    assert source.counters()["replay_unreadable_lines"] >= 2
    assert not marker.exists()


def billion_laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    return "\n".join(lines) + "\n"


CONFIGURATIONS: dict[str, tuple[str, str]] = {
    "an object": ("model: !!python/object/apply:os.system ['touch MARKER']", "not valid YAML"),
    "a name": ("model: !!python/name:os.system ''", "not valid YAML"),
    "an alias bomb in place of text": (billion_laughs() + "model: {path: *a29}", "model.path"),
    "an alias bomb in place of a number": (
        billion_laughs() + "model: {path: m}\ntrain: {steps: *a29}",
        "train.steps",
    ),
    "deep nesting": ("[" * 50_000, "nested too deeply"),
    "megabytes": ("# " + "x" * (2 << 20), "more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_file_runs_nothing_and_is_refused_at_once(
    name: str, marker: Path, tmp_path: Path
) -> None:
    text, says = CONFIGURATIONS[name]
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("MARKER", str(marker)))
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=says) as caught:
        load_config(file, environment={})
    assert len(str(caught.value)) < 20_000
    assert time.monotonic() - started < 60  # an alias bomb takes longer than the universe has
    assert not marker.exists()


def test_a_template_of_a_model_cannot_reach_python(
    marker: Path, tiny_model_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    )
    line = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "score": 1.0,
    }
    (tmp_path / "texts.jsonl").write_text(json.dumps(line) + "\n")
    done = run_module(
        *("trainer.cli", "replay", "--replay.from", tmp_path / "texts.jsonl"),
        *("--model.path", model, "--train.output_dir", tmp_path / "run"),
        *("--train.device", "cpu", "--train.mixed_precision", "no", "--atropos.batch_size", "1"),
    )
    assert done.returncode != 0
    assert "is unsafe" in " ".join(done.stderr.split()), done.stderr[-2000:]
    assert not marker.exists()
