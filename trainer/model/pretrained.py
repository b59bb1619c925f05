"""A Hugging Face checkpoint, loaded exactly or refused: every tensor is accounted for.

transformers starts tensors that a checkpoint lacks with random values, passes over those it does not know,
and takes an adapter that lies beside the weights; each is only a warning, and another model is trained.

Data flow: names and shapes of the files -> compared with the model, on no device -> weights -> compared
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.peft_utils import find_adapter_config_file

from trainer.errors import ConfigurationError
from trainer.model.tokenizer import require_directory_or_hub_id

_NAMED_AT_MOST: Final = 3
"""Tensors that a message names, of each kind."""

_SAMPLED_OF_A_TENSOR: Final = 4096
"""Numbers; fine-tuning changes a good share of them in every tensor that it trains."""

LOADING_ERRORS: Final = (OSError, ValueError, ImportError, SafetensorError, RuntimeError, KeyError)
"""Errors that transformers raises for a directory that it cannot load."""


def load_model(
    path: str,
    *,
    trust_remote_code: bool,
    attention: str | None,
    setting: str = "model.path",
    first_layers: int | None = None,
) -> Any:
    """Load a causal language model in float32, on the CPU, exactly as the checkpoint holds it.

    Args:
        path: Directory, or hub id.
        trust_remote_code: Whether code beside the weights may run.
        attention: The attention implementation, by transformers' name.
        setting: Which setting names the path, for messages.
        first_layers: So many layers of the language model; what the files hold of others is passed over.
            None: all.

    Raises:
        ConfigurationError: A tensor is missing, unknown, or of another shape; or an adapter lies there.
        OSError, ValueError, ...: See `LOADING_ERRORS`.
    """
    _refuse_adapter(setting, path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if first_layers is not None:
        _keep_first_layers(config, first_layers)
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # they are refused here, by name
        output_loading_info=True,
    )
    if first_layers is not None:
        info["unexpected_keys"] = []
    _refuse_differences(setting, path, info)
    return model


def _keep_first_layers(config: Any, layers: int) -> None:
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]


def load_structure(path: str, *, trust_remote_code: bool, setting: str = "model.path") -> Any | None:
    """Build the model without its weights, and account for every tensor by the files' headers alone.

    Args:
        path: Directory; None is returned for a hub id, whose files may not be here yet, and for quantized
            weights, which only the load itself can judge.
        trust_remote_code: Whether code beside the weights may run.
        setting: See `load_model`.

    Raises:
        ConfigurationError, OSError, ValueError, ...: See `load_model`.
    """
    require_directory_or_hub_id(setting, path)
    if not Path(path).is_dir():
        return None
    _refuse_adapter(setting, path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        return None
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model, info = type(built).from_pretrained(
        None,
        config=built.config,
        dtype=torch.float32,
        state_dict=_tensors_without_values(Path(path)),
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _refuse_differences(setting, path, info)
    return model


def weights_identity(model: nn.Module, read: Callable[[str], torch.Tensor] | None = None) -> str:
    """SHA-256 over names, shapes and a sample of the numbers of every tensor: which weights these are.

    A sample, because hashing all of a large base would take longer than reading it.

    Args:
        model: Without adapters.
        read: Returns a tensor of those that have no values in the model, by its name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        numbers = (read(name) if read is not None and tensor.is_meta else tensor).detach().reshape(-1)
        sample = numbers[:: max(1, numbers.numel() // _SAMPLED_OF_A_TENSOR)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors_without_values(directory: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by name, with their shapes, on no device."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    names = [single.name]
    if not single.exists() and index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors = {}
    for name in names:
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a file of tensors is no mapping
                tensors[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
    return tensors


def _refuse_adapter(setting: str, path: str) -> None:
    found = find_adapter_config_file(path)
    if found is None:
        return
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise ConfigurationError(
            f"{setting} {path!r} holds an adapter ({found}) and no model; merge it into its base, and name "
            "the merged directory"
        )
    raise ConfigurationError(
        f"{found} lies beside the model, so transformers would load an adapter into it; move it away to "
        "train the model without, or merge it and name the merged directory"
    )


def _refuse_differences(setting: str, path: str, info: dict[str, Any]) -> None:
    """Refuse what differs between the checkpoint and the model that its config.json describes.

    transformers has left out what an architecture may lack or ignore: tied weights, buffers, further heads.
    """
    shapes = [
        f"{name} {list(stored)} instead of {list(expected)}"
        for name, stored, expected in sorted(info["mismatched_keys"], key=lambda each: str(each[0]))
    ]
    found = [
        f"{len(names)} {what}: {', '.join(names[:_NAMED_AT_MOST])}{', ...' * (len(names) > _NAMED_AT_MOST)}"
        for what, names in (
            ("missing from it", sorted(info["missing_keys"])),
            ("not of this model", sorted(info["unexpected_keys"])),
            ("of another shape", shapes),
            ("not readable", [str(error) for error in info["error_msgs"]]),
        )
        if names
    ]
    if not found:
        return
    prefix = next(
        (each for each in ("_orig_mod.", "module.") if _all_begin(info["unexpected_keys"], each)), ""
    )
    hint = f"; the names carry the prefix {prefix!r} of a wrapper: save the model inside it" if prefix else ""
    raise ConfigurationError(
        f"{setting} {path!r}: its tensors are not those that its config.json describes. "
        f"{'; '.join(found)}{hint}. Nothing is trained with random values in their place"
    )


def _all_begin(names: Any, prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)
