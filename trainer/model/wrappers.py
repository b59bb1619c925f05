"""Unwraps what training puts around a model: DistributedDataParallel, torch.compile, PEFT."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

_LORA_PARAMETERS = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside DistributedDataParallel, torch.compile and PEFT wrappers."""
    inner = unwrap_training(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def unwrap_training(model: nn.Module) -> Any:
    """Return the model inside DistributedDataParallel and torch.compile: PEFT's, if it has adapters."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if inner is model:
            return model
        model = inner


def plain_name(name: str) -> str:
    """Return a weight's name without what adapters put into it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether the tensor of this name belongs to an adapter."""
    return any(part in name for part in _LORA_PARAMETERS)


def weights_by_name(inner: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors, without adapters, by the names that they have without adapters."""
    return {plain_name(name): tensor for name, tensor in inner.state_dict().items() if not is_adapter(name)}


def adapted_layers(inner: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the name of the weight that each adapts."""
    return {
        f"{name}.weight": module
        for name, module in inner.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
