"""A transformers language model run on batches without padding, over a key/value pool.

Any causal model works whose attention goes through transformers' attention interface and is plainly causal
(within `max_model_len`, which stays below a sliding window). A self-check at start compares the batched
forward with the model's own and refuses a model for which they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from local_stack.inference.attention import (
    IMPLEMENTATION,
    DecodePlan,
    Piece,
    Plan,
    PrefillPlan,
    packed_attention,
)
from local_stack.inference.errors import UnsupportedModel
from local_stack.inference.kv_pool import KeyValuePool
from local_stack.inference.settings import EngineSettings
from local_stack.inference.weights import WeightTargets

_log = logging.getLogger(__name__)

_DEFAULT_MAX_MODEL_LEN = 4096
# Largest difference in log-probs between two ways to compute the same forward: rounding, with a wide margin.
_SELF_CHECK_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.5}


class PackedModel:
    """The model with its batched forward.

    Args:
        settings: Where the model lies, its precision, and the longest sequence.

    Raises:
        UnsupportedModel: The batched forward does not compute what the model computes.
    """

    def __init__(self, settings: EngineSettings) -> None:
        AttentionInterface.register(IMPLEMENTATION, packed_attention)
        self._model = AutoModelForCausalLM.from_pretrained(
            settings.model,
            dtype="auto" if settings.dtype == "auto" else getattr(torch, settings.dtype),
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
        ).eval()
        if settings.dtype == "auto":
            self._model.to(preferred_dtype(self._model.dtype))
        self.targets = WeightTargets(self._model)
        self.dtype: torch.dtype = self._model.dtype
        _widen_head(self._model, self.targets)
        config = self._model.config.get_text_config()
        self.vocabulary_size: int = self._model.get_output_embeddings().weight.shape[0]
        self.max_model_len = _max_model_len(config, settings.max_model_len)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._pool_shape = {
            "layers": config.num_hidden_layers,
            "heads": heads,
            "head_size": getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
        }
        self._budget = settings.max_cached_tokens
        self._self_check()

    def new_pool(self) -> KeyValuePool:
        """Make an empty pool that fits this model."""
        return KeyValuePool(**self._pool_shape, dtype=self.dtype, budget=self._budget)

    def eos_token_ids(self) -> list[int]:
        """End-of-sequence ids of the generation config; the first is the main one."""
        value = getattr(self._model.generation_config, "eos_token_id", None)
        return [] if value is None else [value] if isinstance(value, int) else list(value)

    @torch.inference_mode()
    def prefill(
        self,
        pool: KeyValuePool,
        pieces: Sequence[Piece],
        token_ids: Sequence[Sequence[int]],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Run several tokens of a few rows and store their keys and values.

        Args:
            pool: Already large enough (`reserve`).
            pieces: Which columns of which rows; a row's columns must be run in order.
            token_ids: The tokens of each piece.
            wanted: Indices into the tokens of all pieces, laid end to end: whose logits to return.

        Returns:
            [len(wanted), V] float32.
        """
        flat = [token for ids in token_ids for token in ids]
        positions = [column for piece in pieces for column in range(piece.start, piece.stop)]
        logits = self._forward(PrefillPlan(pool, pieces), torch.tensor(flat), torch.tensor(positions), wanted)
        for piece in pieces:
            pool.lengths[piece.row] = piece.stop
        return logits

    @torch.inference_mode()
    def decode(self, pool: KeyValuePool, token_ids: Sequence[int]) -> torch.Tensor:
        """Run one token of every row in use and store its key and value: [R] -> [R, V] float32."""
        plan = DecodePlan(pool)
        logits = self._forward(plan, torch.tensor(token_ids), plan.columns, range(pool.rows))
        pool.lengths[:] = [length + 1 for length in pool.lengths]
        return logits

    def _forward(
        self, plan: Plan, token_ids: torch.Tensor, positions: torch.Tensor, wanted: Sequence[int]
    ) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.int64),
            plan=plan,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Compare with the model's own forward on two short sequences: prefill in two steps, then decode."""
        generator = torch.Generator().manual_seed(0)
        first, second = (
            torch.randint(self.vocabulary_size, (n,), generator=generator).tolist() for n in (7, 5)
        )
        pool = self.new_pool()
        pool.add_rows(2)
        pool.reserve(len(first))
        self.prefill(pool, [Piece(0, 0, 3)], [first[:3]], [])
        self.prefill(pool, [Piece(0, 3, 6), Piece(1, 0, 4)], [first[3:6], second[:4]], [])
        batched = self.decode(pool, [first[6], second[4]]).log_softmax(dim=-1)
        self._model.set_attn_implementation("eager")
        plain = torch.stack(
            [self._model(input_ids=torch.tensor([ids])).logits[0, -1].float() for ids in (first, second)]
        ).log_softmax(dim=-1)
        self._model.set_attn_implementation(IMPLEMENTATION)
        difference = (batched - plain).abs().max().item()
        if not difference <= _SELF_CHECK_TOLERANCE[self.dtype]:
            raise UnsupportedModel(
                f"the batched forward of {type(self._model).__name__} differs from its own by "
                f"{difference:.3g} in log-probs; use a Llama-like model here, or vLLM"
            )


def preferred_dtype(stored: torch.dtype) -> torch.dtype:
    """Precision for `auto`: float32, unless half precision is stored and this CPU computes in it.

    Without hardware support bfloat16 is emulated, about eight times slower than float32.
    """
    half = stored in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if half and _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    try:
        description = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux: the safe answer
        return False
    return "avx512_bf16" in description or "amx_bf16" in description


def _widen_head(model: Any, targets: WeightTargets) -> None:
    """Keep the language-model head in float32: log-probs in half precision are only good to 0.03 or so."""
    head = model.get_output_embeddings()
    if head.weight.dtype == torch.float32:
        return
    path = next(name for name, module in model.named_modules() if module is head)
    for name, parameter in list(head.named_parameters(recurse=False)):
        # A new parameter: widening the old one in place would widen the embedding that it may be tied to.
        wide = torch.nn.Parameter(parameter.detach().float(), requires_grad=False)
        setattr(head, name, wide)
        targets.retarget(f"{path}.{name}", wide)
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))


def _max_model_len(config: Any, asked: int | None) -> int:
    limit: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        limit = min(limit, window)
    if asked is None:
        return min(limit, _DEFAULT_MAX_MODEL_LEN)
    if asked > limit:
        raise UnsupportedModel(f"--max-model-len {asked} is more than the model's {limit} tokens")
    return asked
