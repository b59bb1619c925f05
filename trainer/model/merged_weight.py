"""Merges an adapter into the weight that it adapts, for whoever reads the model as its base is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.model.sharding import product_by_rows


def merged_weight(name: str, module: Any) -> Tensor:
    """Return one adapted layer's weight with its active adapters merged in; a new tensor if there are any.

    That is `W + scale * B A`, in float32 also where `W` has fewer bytes.

    Args:
        name: The weight's name, for messages.
        module: PEFT's LoRA layer.

    Raises:
        CheckpointError: An adapter is of a kind whose effect is not a sum with the weight
            (DoRA, an adapter with a bias).
    """
    weight: Tensor = module.base_layer.weight.detach()
    if module.merged:  # PEFT has added the adapter into the weight already
        return weight
    for adapter in module.active_adapters:
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        if adapter in module.lora_variant or module.lora_bias.get(adapter, False):
            raise CheckpointError(
                f"{name} has an adapter that is more than a sum with the weight (DoRA and other variants, "
                "or an adapter with a bias), which cannot be merged; train with plain LoRA"
            )
        with torch.no_grad():
            weight = _delta(module, adapter).to(weight.device) + weight
    return weight


def _delta(module: Any, adapter: str) -> Tensor:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or module.fan_in_fan_out:
        return module.get_delta_weight(adapter)  # type: ignore[no-any-return]  # PEFT's
    # As PEFT does it, but that of factors which are spread it would exchange whole products.
    delta = product_by_rows(module.lora_B[adapter].weight, module.lora_A[adapter].weight)
    return delta.mul_(module.scaling[adapter])
