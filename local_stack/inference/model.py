"""A transformers language model on batches: rows of one length, padded on the left, with their cache.

`R` rows, `L` columns of the cache, `T` new columns, `V` vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from local_stack.inference.errors import UnsupportedModel
from local_stack.inference.records import EngineSettings, PromptScores
from schemas.inference import LOWEST_LOGPROB

_DEFAULT_MAX_MODEL_LEN = 4096
_SELF_CHECK_TOLERANCE = 0.01
"""Log-probs of a padded row against those of the row alone, in float32: rounding, with a wide margin."""
_SCORED_TOKENS_PER_FORWARD = 128
"""Every position needs logits: 128 x 150,000 float32 are 77 MB."""


@dataclass
class Rows:
    """Keys and values of some sequences; all end in the last column."""

    cache: Any
    mask: torch.Tensor
    """[R, L] 1 where a column belongs to the row's sequence, 0 where it is padding."""

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; repeated rows are copied."""
        self.cache.batch_select_indices(torch.tensor(rows))
        self.mask = self.mask[rows]


class Model:
    """The model with its tokens' limits, in float32.

    Args:
        settings: Where the model lies and the longest sequence.

    Raises:
        UnsupportedModel: It gives other results in a padded batch than alone.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.module: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, use_safetensors=True
        ).eval()
        self.vocabulary_size: int = self.module.get_output_embeddings().weight.shape[0]
        self.max_model_len = _max_model_len(self.module.config.get_text_config(), settings.max_model_len)
        eos = getattr(self.module.generation_config, "eos_token_id", None)
        self.eos_token_ids: list[int] = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.check_padding()

    @torch.inference_mode()
    def prefill(self, prompts: ListLike[list[int]]) -> tuple[Rows, torch.Tensor]:
        """Compute whole prompts, what they all begin with once; return their rows and next logits [R, V]."""
        rows = Rows(DynamicCache(), torch.ones(1, 0, dtype=torch.int64))
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        if len(prompts) > 1 and shared:
            self._forward(rows, torch.tensor([prompts[0][:shared]]))
            rows.select([0] * len(prompts))
        else:
            shared = 0
        rows.mask = rows.mask.expand(len(prompts), -1)
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        tokens = [[0] * gap + prompt[shared:] for gap, prompt in zip(missing, prompts, strict=True)]
        mask = torch.arange(longest - shared)[None, :] >= torch.tensor(missing)[:, None]
        return rows, self._forward(rows, torch.tensor(tokens), mask.to(torch.int64))[:, -1]

    @torch.inference_mode()
    def decode(self, rows: Rows, token_ids: list[int]) -> torch.Tensor:
        """Add one token to every row; return the next logits [R, V]."""
        return self._forward(rows, torch.tensor(token_ids)[:, None])[:, -1]

    @torch.inference_mode()
    def score(self, prompt: list[int], top: int) -> PromptScores:
        """Score every token of a prompt, with its `top` likeliest alternatives."""
        rows = Rows(DynamicCache(), torch.ones(1, 0, dtype=torch.int64))
        scores: PromptScores = [None]
        for start in range(0, len(prompt) - 1, _SCORED_TOKENS_PER_FORWARD):
            tokens = prompt[start : start + _SCORED_TOKENS_PER_FORWARD]
            logits = self._forward(rows, torch.tensor([tokens]), keep=len(tokens))[0]
            logprobs = logits.log_softmax(dim=-1).clamp(min=LOWEST_LOGPROB)
            for row, token in zip(logprobs, prompt[start + 1 : start + 1 + len(tokens)], strict=False):
                values, ids = row.topk(top)
                rivals = zip(ids.tolist(), values.tolist(), strict=True)
                scores.append({token: row[token].item(), **dict(rivals)})
        return scores

    def _forward(
        self, rows: Rows, tokens: torch.Tensor, mask: torch.Tensor | None = None, *, keep: int = 1
    ) -> torch.Tensor:
        """Add `tokens` [R, T] to the rows; return the last `keep` columns' logits [R, keep, V]."""
        rows.mask = torch.cat([rows.mask, torch.ones_like(tokens) if mask is None else mask], dim=1)
        # Padding has no position; a row that has ended at the limit still gets tokens.
        positions = (rows.mask.cumsum(dim=1) - 1).clamp(0, self.max_model_len - 1)
        output = self.module(
            input_ids=tokens,
            attention_mask=rows.mask,
            position_ids=positions[:, -tokens.shape[1] :],
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    @torch.inference_mode()
    def check_padding(self) -> None:
        """Compare padded and cached rows with the model alone; refuse a model for which they differ."""
        name = type(self.module).__name__
        try:
            rows, _ = self.prefill([[1, 2, 3, 4, 5], [1, 2]])
            batched = self.decode(rows, [3, 4])
            texts = ([1, 2, 3, 4, 5, 3], [1, 2, 4])
            alone = torch.stack([self.module(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{name} cannot be run in batches: {error}") from error
        difference = (batched.log_softmax(-1) - alone.log_softmax(-1)).abs().max().item()
        if not difference <= _SELF_CHECK_TOLERANCE:
            raise UnsupportedModel(
                f"{name} gives other log-probs in a padded batch than alone (by {difference:.3g}); "
                "use a Llama-like model here, or vLLM"
            )


def _max_model_len(config: Any, asked: int | None) -> int:
    limit: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        limit = min(limit, window)  # the cache keeps all columns
    if asked is None:
        return min(limit, _DEFAULT_MAX_MODEL_LEN)
    if asked > limit:
        raise UnsupportedModel(f"--max-model-len {asked} is more than the model's {limit} tokens")
    return asked
