"""An independent reference for the embedded server: a plain transformers forward in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Reference:
    """The model in `directory`, in double precision, one sequence at a time, no cache."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager"
        )

    @torch.inference_mode()
    def distributions(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probs of every token after every prefix. [T, V]."""
        logits = self._model(input_ids=torch.tensor([token_ids])).logits[0]
        result: torch.Tensor = logits.log_softmax(dim=-1)
        return result

    def logprobs(self, prompt: list[int], completion: list[int]) -> list[float]:
        """Log-prob of each token of the completion."""
        table = self.distributions([*prompt, *completion])
        rows = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        return [table[row, token].item() for row, token in zip(rows, completion, strict=True)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition` holds; fail naming `what` after a generous time."""
    deadline = monotonic() + 60
    while not condition():
        assert monotonic() < deadline, f"waited in vain for {what}"
        sleep(0.005)
