"""Settings of the embedded server, each with its unit and default in this one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DtypeName = Literal["auto", "float32", "bfloat16"]
LogProbsMode = Literal["raw_logprobs", "processed_logprobs"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to load the model and how much to run at once."""

    model: str
    """A Hugging Face directory (or hub id) with safetensors weights and a tokenizer."""
    dtype: DtypeName = "auto"
    """`auto`: float32, unless the checkpoint is half precision and this CPU computes in bfloat16."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and completion together; None: the model's own, at most 4096."""
    max_num_seqs: int = 64
    """Most sequences in one batch; the rest waits."""
    max_cached_tokens: int = 65_536
    """Most key/value columns held at once, over all sequences: bounds the memory (46 kB each for 135M)."""
    seed: int = 0
    """Of the sampling of requests without a seed of their own, together with their order of arrival."""
    logprobs_mode: LogProbsMode = "raw_logprobs"
    """Log-probs of the model's own distribution, or of the one sampled from (temperature, top-p, ...)."""
