"""Models what SGLang's HTTP server says (0.5.23): the routes that publishing uses, no others.

Field names, types and defaults are those of SGLang's own request models. Requests refuse unknown fields,
because SGLang drops them without a word: a misspelt `flush_cache` would do nothing. Replies drop unknown
fields, so that a newer server can add some.

Log-probs are natural logarithms. SGLang's JSON has `null` for what is not finite.

Not here: fields that publishing leaves at their defaults and that concern other uses (images, sessions,
disaggregation), and SGLang's OpenAI-compatible routes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, RootModel

from schemas.inference import TokenIds

PauseMode = Literal["abort", "retract", "in_place"]
"""Fate of the requests in flight: ended; back into the queue, their keys and values to be computed
again; or frozen as they are, with keys and values that old weights computed."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


# --- state ----------------------------------------------------------------------------------------


class ModelInfo(_Reply):
    """Reply of `GET /model_info`."""

    model_path: str
    """Directory of the weights; the last one that was loaded from disk."""
    is_generation: bool = True
    weight_version: str | None = None
    """The label; `default` until somebody sets one."""


class ServerInfo(_Reply):
    """Reply of `GET /server_info`: what the server was started with."""

    tokenizer_worker_num: int = 1
    """Processes that take HTTP requests."""
    hicache_storage_backend: str | None = None
    """Where keys and values are kept outside of the server; None: nowhere."""


class StatusReply(_Reply):
    """Reply of `POST /pause_generation` and `POST /continue_generation`."""

    status: Literal["ok"]
    message: str = ""


class OperationReply(_Reply):
    """Reply of the weight routes: status 200 if `success`, else 400."""

    success: bool
    message: str


class PauseRequest(_Request):
    """Body of `POST /pause_generation`."""

    mode: PauseMode = "abort"


class ContinueRequest(_Request):
    """Body of `POST /continue_generation`: nothing but `{}`."""


class WeightVersionRequest(_Request):
    """Body of `POST /update_weight_version`."""

    new_version: str
    abort_all_requests: bool = True
    """End everything that is in flight. The default does: say no."""


# --- weights --------------------------------------------------------------------------------------


class DiskUpdateRequest(_Request):
    """Body of `POST /update_weights_from_disk`."""

    model_path: str
    """Directory, as the server sees it."""
    weight_version: str | None = None
    """New label; None leaves it."""
    flush_cache: bool = True
    """Empty the prefix cache. With requests in flight that is refused, after the weights were loaded."""


# --- generation -----------------------------------------------------------------------------------


class SamplingParameters(_Request):
    """Field `sampling_params` of `POST /generate`; SGLang refuses unknown fields here itself."""

    max_new_tokens: int | None = 128
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 1 << 30
    """That, or -1: the whole vocabulary."""
    min_p: float | None = 0.0
    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    ignore_eos: bool | None = False


class GenerateRequest(_Request):
    """Body of `POST /generate`, for one prompt or for several."""

    input_ids: TokenIds | list[TokenIds]
    sampling_params: SamplingParameters = Field(default_factory=SamplingParameters)
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    """First prompt token to score; what comes from there on is not taken from the prefix cache. None and
    -1: none, only generated tokens."""
    top_logprobs_num: int | None = None
    """Number of the likeliest tokens to tell at each position."""


class TokenLogProb(NamedTuple):
    """One token at one position; an array in JSON."""

    logprob: float | None
    """None for the first token of a prompt, and where it is not finite."""
    token_id: int
    text: str | None = None


class MetaInfo(_Reply):
    """Facts of one reply of SGLang, besides its text."""

    cached_tokens: int | None = None
    """Prompt tokens whose keys and values were taken from the prefix cache."""
    input_token_logprobs: list[TokenLogProb] | None = None
    """From `logprob_start_len` on; the first has no log-prob. Ids at the very end of the vocabulary come
    back as 0."""
    output_token_logprobs: list[TokenLogProb] | None = None
    """Of the generated tokens, divided by the temperature unless the server runs with
    SGLANG_RETURN_ORIGINAL_LOGPROB=1."""
    output_top_logprobs: list[list[TokenLogProb] | None] | None = None


class GenerateReply(_Reply):
    """Reply of `POST /generate` to one prompt."""

    meta_info: MetaInfo


class GenerateReplies(RootModel[list[GenerateReply]]):
    """Reply of `POST /generate` to several prompts, in their order."""
