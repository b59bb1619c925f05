"""What SGLang's HTTP server says (0.5.23): the routes that publishing uses, no others.

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
"""What becomes of the requests in flight: ended; back into the queue, their keys and values to be computed
again; or frozen as they are, with keys and values that old weights computed."""

Selector = Literal["target", "draft", "all"]
"""Which models of a server take new weights, if one drafts for the other."""

GROUP_NAME = "weight_update_group"
"""Name of a process group, where none is given."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


# --- state ----------------------------------------------------------------------------------------


class ModelInfo(_Reply):
    """Reply of `GET /model_info`."""

    model_path: str
    """Directory of the weights; the last one that was loaded from disk."""
    served_model_name: str | None = None
    """The name in `/v1/models`; loading from disk replaces it by the directory."""
    is_generation: bool = True
    weight_version: str | None = None
    """The label; `default` until somebody sets one."""


class ServerInfo(_Reply):
    """Reply of `GET /server_info`: what the server was started with."""

    version: str | None = None
    tp_size: int = Field(ge=1)
    """Workers that share one copy of the model."""
    dp_size: int = 1
    """Copies of the model behind one address."""
    pp_size: int = 1
    """Stages of the model, on workers of their own."""
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
    """Body of `POST /continue_generation`."""

    torch_empty_cache: bool = True
    """Give memory that is cached but not used back to the driver."""


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
    load_format: str | None = None
    """None: as the server was started."""
    abort_all_requests: bool = False
    weight_version: str | None = None
    """New label; None leaves it."""
    is_async: bool = False
    torch_empty_cache: bool = False
    keep_pause: bool = False
    recapture_cuda_graph: bool = False
    token_step: int = 0
    flush_cache: bool = True
    """Empty the prefix cache. With requests in flight that is refused, after the weights were loaded."""


class GroupInitRequest(_Request):
    """Body of `POST /init_weights_update_group`: the workers join a process group."""

    master_address: str
    """Where rank 0 listens."""
    master_port: int
    rank_offset: int
    """Rank of the server's first worker."""
    world_size: int
    """All workers and the sender."""
    group_name: str = GROUP_NAME
    backend: str = "nccl"


class GroupDestroyRequest(_Request):
    """Body of `POST /destroy_weights_update_group`."""

    group_name: str = GROUP_NAME


class UpdateBeginRequest(_Request):
    """Body of `POST /begin_weight_update`; only after it are weights taken from a group."""

    selector: Selector = "all"


class UpdateEndRequest(_Request):
    """Body of `POST /end_weight_update`; an empty object."""


class GroupUpdateRequest(_Request):
    """Body of `POST /update_weights_from_distributed`: what rank 0 will broadcast, in this order."""

    names: list[str]
    dtypes: list[str]
    """`bfloat16`, `float32`, ...: names in torch."""
    shapes: list[list[int]]
    group_name: str = GROUP_NAME
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None
    """None: one broadcast for each weight. `flattened_bucket`: one for all."""
    selector: Selector = "all"
    torch_empty_cache: bool = False


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
    """How many of the likeliest tokens to tell at each position."""
    stream: bool = False


class TokenLogProb(NamedTuple):
    """One token at one position; an array in JSON."""

    logprob: float | None
    """None for the first token of a prompt, and where it is not finite."""
    token_id: int
    text: str | None = None


class FinishReason(_Reply):
    """Why generation ended."""

    type: str
    """`stop`, `length` or `abort`."""
    message: str | None = None


class VersionSpan(_Reply):
    """Which weights generated which tokens of a reply."""

    version: str
    start: int
    """First generated token."""
    end: int
    """One after the last."""


class MetaInfo(_Reply):
    """What SGLang tells of one reply, besides its text."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens whose keys and values were taken from the prefix cache."""
    finish_reason: FinishReason | None = None
    input_token_logprobs: list[TokenLogProb] | None = None
    """From `logprob_start_len` on; the first has no log-prob. Ids at the very end of the vocabulary come
    back as 0."""
    output_token_logprobs: list[TokenLogProb] | None = None
    """Of the generated tokens, divided by the temperature unless the server runs with
    SGLANG_RETURN_ORIGINAL_LOGPROB=1."""
    output_top_logprobs: list[list[TokenLogProb] | None] | None = None
    weight_version: str | None = None
    weight_versions: list[VersionSpan] = Field(default_factory=list)


class GenerateReply(_Reply):
    """Reply of `POST /generate` to one prompt."""

    text: str = ""
    output_ids: list[int] = Field(default_factory=list)
    meta_info: MetaInfo


class GenerateReplies(RootModel[list[GenerateReply]]):
    """Reply of `POST /generate` to several prompts, in their order."""
