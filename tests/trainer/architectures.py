"""Tiny random bases of many architectures, made and read by whichever transformers runs this.

`python -m tests.trainer.architectures make DIRECTORY` writes a base per architecture;
`python -m tests.trainer.architectures read FILE DIRECTORY...` writes each directory's log-probs to FILE.
Nothing of the trainer is imported: another environment, with another transformers, runs it as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

VOCABULARY = 97
TOKENS = [3, 14, 15, 92, 65, 35, 8, 97 - 1, 9, 3, 23, 84, 62, 64, 33, 83, 27, 9, 50, 28]

_FLOAT32 = ("norm", ".ln_", "A_log", ".D", "dt_bias")

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-llama3-rope": (
        "llama",
        {"rope_scaling": _LLAMA3, "rope_theta": 5e5, "tie_word_embeddings": False},
    ),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_scaling": _YARN, "rope_theta": 1e6}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 16, "decoder_sparse_step": 1}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "phi-partial-rotary": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi3-fused": ("phi3", {}),
    "stablelm-partial-rotary": ("stablelm", {"partial_rotary_factor": 0.25, "num_key_value_heads": 4}),
    "glm4-partial-rotary": ("glm4", {"partial_rotary_factor": 0.5, "head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 8}),
    "gemma3-text": ("gemma3_text", {"head_dim": 8, "sliding_window": 8, "rope_local_base_freq": 1e4}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "qwen3-next-hybrid": (
        "qwen3_next",
        {
            **_EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "full_attention_interval": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bamba-hybrid": (
        "bamba",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "mamba_n_groups": 1,
        },
    ),
    "falcon-h1-hybrid": (
        "falcon_h1",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "head_dim": 8,
        },
    ),
    "gemma3-vision": (
        "gemma3",
        {
            "text_config": {**_PLAIN, "head_dim": 8, "sliding_window": 8, "model_type": "gemma3_text"},
            "vision_config": {
                **_VISION,
                "image_size": 28,
                "patch_size": 14,
                "model_type": "siglip_vision_model",
            },
            "mm_tokens_per_image": 4,
        },
    ),
}
"""Model type and configuration by name."""


def make(name: str, directory: Path) -> None:
    """Write a base in bfloat16 whose norms and recurrent parameters are float32."""
    kind, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(changes if "text_config" in changes else _PLAIN | changes))
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except TypeError:
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.05
            parameter.add_(noise)
            if not any(part in parameter_name for part in _FLOAT32):
                parameter.data = parameter.data.to(torch.bfloat16)
    config.dtype = torch.bfloat16
    model.save_pretrained(directory)


def logprobs(directory: Path) -> torch.Tensor:
    """Log-probs of a fixed text, all tokens of the vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([TOKENS])).logits
    result: torch.Tensor = torch.log_softmax(logits[0], dim=-1)
    return result


def main() -> None:
    """Make or read."""
    set_verbosity_error()
    disable_progress_bar()
    action, target, *words = sys.argv[1:]
    if action == "make":
        for name in words or ARCHITECTURES:
            make(name, Path(target) / name)
        return
    save_file({word: logprobs(Path(word)) for word in words}, Path(target))


if __name__ == "__main__":
    main()
