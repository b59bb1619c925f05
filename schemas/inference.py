"""Requests and replies of inference servers over HTTP: vLLM's routes as of 0.32.

Both ends use these models: the trainer as a client, the embedded server as a server. A request for
completions keeps unknown fields (`model_extra`), because vLLM accepts them; the server decides which of them
it must refuse. Everything else drops unknown fields, so that a newer server can add some.

Log-probs are natural logarithms. A value of minus infinity travels as `LOWEST_LOGPROB`, because JSON has no
infinity.

Not here: what a field does to the sampling (that is the server's business), Atropos's `/generate` (that is
`inference_plugins/atropos_generate.py`), SGLang's shapes, streaming.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity in every log-prob that is sent as JSON; the value is vLLM's."""

TokenId = Annotated[int, Field(ge=0, strict=True)]
TokenIds = list[TokenId]
PauseMode = Literal["abort", "wait", "keep"]
"""Fate of the requests in flight: ended, finished first, or frozen until `/resume`."""


def _now() -> int:
    return int(time.time())


class _OpenMessage(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


# --- errors and small routes ----------------------------------------------------------------------


class ErrorInfo(_Message):
    """Why a request was refused."""

    message: str
    type: str
    """A class of errors, e.g. `BadRequestError`, `NotFoundError`, `InternalServerError`."""
    param: str | None = None
    """The field of the request at fault, where it is one."""
    code: int
    """The HTTP status once more."""


class ErrorReply(_Message):
    """The body of every reply with an error status."""

    error: ErrorInfo


class ModelCard(_Message):
    """One served model in `GET /v1/models`."""

    id: str
    """The name that requests put into `model`."""
    object: str = "model"
    created: int = Field(default_factory=_now)
    owned_by: str = "vllm"
    root: str | None = None
    """Path or hub name that the server was started with."""
    parent: str | None = None
    """The base model of an adapter."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and completion together."""


class ModelList(_Message):
    """Reply of `GET /v1/models`."""

    object: str = "list"
    data: list[ModelCard] = Field(default_factory=list)


class PromptTokensDetails(_Message):
    """Where the tokens of a prompt came from."""

    cached_tokens: int | None = None
    """Those whose keys and values were taken from the prefix cache."""


class Usage(_Message):
    """Token counts of one request; `completion_tokens` is summed over all samples."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    """Only with vLLM's `--enable-prompt-tokens-details`."""


class TokenLogProb(_Message):
    """One candidate at one position."""

    logprob: float


PromptLogProbs = list[dict[int, TokenLogProb] | None]
"""Entry `t` speaks of prompt token `t`: that token first, then the `k` likeliest ones. Entry 0 is None."""


# --- completions ----------------------------------------------------------------------------------


class CompletionRequest(_OpenMessage):
    """Body of `POST /v1/completions`; defaults are neutral, limits vLLM's, and null is the default."""

    model: str | None = None
    prompt: TokenIds | list[TokenIds] | str | list[str]
    """One prompt or several, as token ids or as text."""
    n: int = Field(default=1, ge=1, le=16_384)
    """Samples per prompt."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    """0 and -1 mean the whole vocabulary."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """None: the server's; it may come as -1."""
    max_tokens: int = Field(default=16, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """The text ends before the first of these; the token ids keep the tokens that completed it."""
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Also return the sampled tokens' log-probs, and those of that many likeliest tokens."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    """Also score the prompt: that many likeliest tokens per position, besides the prompt's own token."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Write tokens in `logprobs` as `token_id:<id>` instead of as text."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        return given if given.get("seed") != -1 else {**given, "seed": None}

    @field_validator("stop", mode="before")
    @classmethod
    def _take_one_text(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


class CompletionLogProbs(_Message):
    """Log-probs of one completion; the lists are parallel, one entry per generated token."""

    token_logprobs: list[float | None] = Field(default_factory=list)
    tokens: list[str] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = Field(default_factory=list)


class CompletionChoice(_Message):
    """One sample. `index` is `prompt number * n + sample number`."""

    index: int
    text: str
    logprobs: CompletionLogProbs | None = None
    finish_reason: str | None = None
    """`stop`, `length` or `abort`."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token and for the rest."""
    token_ids: list[int] | None = None
    """Generated token ids, the end-of-sequence token included, if `return_token_ids` was set."""
    prompt_logprobs: PromptLogProbs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionReply(_Message):
    """Reply of `POST /v1/completions`."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[CompletionChoice]
    usage: Usage


# --- chat -----------------------------------------------------------------------------------------


class ChatMessage(_OpenMessage):
    """One message of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    """Text, or a list of parts such as `{"type": "text", "text": ...}`."""


class ChatCompletionRequest(_OpenMessage):
    """Body of `POST /v1/chat/completions`; what it says of the sampling is as in `CompletionRequest`."""

    model: str | None = None
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """Wins over `max_tokens`; with neither, the rest of the context."""
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


# --- tokenizer ------------------------------------------------------------------------------------


class TokenizeRequest(_Message):
    """Body of `POST /tokenize`."""

    model: str | None = None
    prompt: str


class TokenizeReply(_Message):
    """Reply of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


# --- weights --------------------------------------------------------------------------------------


class PauseReply(_Message):
    """Reply of `POST /pause` (`paused`) and `POST /resume` (`resumed`)."""

    status: str


class PauseState(_Message):
    """Reply of `GET /is_paused`."""

    is_paused: bool


class CollectiveRpcRequest(_Message):  # type: ignore[no-redef]  # pydantic plugin: a field named kwargs
    """Body of `POST /collective_rpc`: run a method on every worker.

    To load weights: `method="reload_weights", kwargs={"weights_path": "<directory>"}`.
    """

    method: str
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    timeout: float | None = None
    """Seconds."""


class CollectiveRpcReply(_Message):
    """Reply of `POST /collective_rpc`: one entry per worker, None where the method returns nothing."""

    results: list[Any]


class DeltaState(_Message):
    """What one worker with our extension says of the versions that it holds and was asked to read."""

    version: int | None
    """The version that it holds. None: it is not known, or a write failed half-way."""
    checksum: str | None
    """Of the whole model's bits in that version, as the trainer computes it."""
    error: str | None
    """Why the file that it was asked for last is not to be applied."""
    unfit: bool
    """Whether no other file would do: its weights are laid out in another way than a checkpoint's."""
    ready: str | None
    """The file that it has checked and could apply."""
    sums: dict[str, tuple[int, int]] | None
    """What it would then hold: by the checkpoint's names the sum and the count of its own numbers."""


class DeltaDone(_Message):
    """What one worker with our extension says after it was told to do something."""

    error: str | None


class CacheResetReply(_Message):
    """Reply of `POST /reset_prefix_cache`; with vLLM a 200 may say `success: false` (cache in use)."""

    success: bool


class WeightVersionRequest(_Message):
    """Body of `POST /update_weight_version`."""

    new_version: str


class WeightVersionReply(_Message):
    """Reply of `POST /update_weight_version`."""

    success: bool
    new_version: str


class WorldSize(_Message):
    """Reply of `GET /get_world_size`."""

    world_size: int = Field(ge=1)
    """Workers that hold a part or a copy of the model, over all kinds of parallelism."""


class WeightInfo(_Message):
    """Reply of `GET /weight_info`; the label is `default` until somebody sets one."""

    weight_version: str


# --- adapters -------------------------------------------------------------------------------------


class LoadAdapterRequest(_Message):
    """Body of `POST /v1/load_lora_adapter`; the reply is a line of text."""

    lora_name: str
    """Name that requests will put into `model`; one that was never used before."""
    lora_path: str
    """Absolute path of a PEFT directory, as the server sees it. It has to stay as long as any request uses
    the adapter: vLLM may read it again."""


class UnloadAdapterRequest(_Message):
    """Body of `POST /v1/unload_lora_adapter`; the reply is a line of text."""

    lora_name: str


class CurrentAdapter(_Message):
    """Body of `POST /atropos/adapter`, and reply of it and of `GET`: our middleware's route."""

    name: str | None
    """The adapter that `/generate` samples from; None: the model itself."""
    weight_version: str | None = None
    """The label that replies carry."""


class LoraLimits(_Message):
    """Settings that a vLLM server was started with."""

    max_loras: int
    """Adapters that one step of the engine can serve side by side."""


class VllmConfiguration(_Message):
    """The part of vLLM's configuration that we read."""

    lora_config: LoraLimits | None = None
    """None: adapters are off."""


class ServerInfo(_Message):
    """Reply of `GET /server_info?config_format=json`."""

    vllm_config: VllmConfiguration
