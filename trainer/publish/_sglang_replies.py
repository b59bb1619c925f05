"""What SGLang's replies say: numbers for verification, and errors with what to do about them. No I/O."""

from __future__ import annotations

import re
from http import HTTPStatus

from schemas import sglang as wire
from trainer.publish.errors import Phase, PhaseDeadlineExceeded, ServerFailure

LIKELIEST_TOKENS = 5
"""How many tokens' log-probs a generated token comes with."""

REMEDIES = {
    Phase.READY: (
        "see that SGLang runs at this URL (publish.engine says which engine it is); raise "
        "publish.ready_timeout if it is only slow to start"
    ),
    Phase.PAUSE: "look into the server's log",
    Phase.RESUME: (
        "POST /continue_generation with the body {} to the server by hand, or restart it: until then "
        "environments wait for it"
    ),
    Phase.VERIFY: (
        "verification needs POST /generate with input_ids and return_logprob; see the server's log, or set "
        "publish.verify to false to go on without proof"
    ),
}
"""Where what to do is not what it would be with vLLM."""

KEYS = (
    "set publish.token to the server's --api-key; with --admin-api-key, to that one, and give --api-key the "
    "same value or none: the weight routes take the one, /generate the other"
)
"""What to do about a refused token."""

_SAYS_NO = re.compile(r'"success"\s*:\s*false')


def in_sglangs_terms(error: ServerFailure, *, request: str | None = None) -> ServerFailure:
    """The same error, with what to do about it here and, if its reason does not say, to which request."""
    late = isinstance(error, PhaseDeadlineExceeded) and error.phase is not Phase.RESUME
    remedy = error.remedy if late else REMEDIES.get(error.phase, error.remedy)
    if error.status == HTTPStatus.UNAUTHORIZED:
        remedy = KEYS
    status = error.status
    # A request that was understood, and whose work failed: unlike other refusals, worth another try.
    failed = error.phase is Phase.RESET_CACHES or _SAYS_NO.search(error.server_text)
    if status == HTTPStatus.BAD_REQUEST and failed:
        status = None
    return type(error)(
        error.reason if request is None else f"{request}: {error.reason}",
        server=error.server,
        phase=error.phase,
        version=error.version,
        status=status,
        server_text=error.server_text,
        remedy=remedy,
    )


def one_token(temperature: float) -> wire.SamplingParameters:
    """Everything is named: a server may have defaults of its own (--preferred-sampling-params)."""
    return wire.SamplingParameters(
        max_new_tokens=1,
        temperature=temperature,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
    )


def prompt_scores(meta: wire.MetaInfo, token_ids: list[int], *, prompt: int) -> list[float]:
    """Pick the log-probs of a prompt's own tokens.

    Raises:
        ValueError: The reply does not speak of exactly these tokens.
    """
    entries = meta.input_token_logprobs
    if entries is None:
        raise ValueError("the reply has no input_token_logprobs")
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(entries)} log-probs for prompt {prompt} of {len(token_ids)} tokens")
    scores = []
    for position in range(1, len(token_ids)):
        entry, token_id = entries[position], token_ids[position]
        # SGLang reports ids at the very end of the vocabulary as 0.
        if entry.logprob is None or entry.token_id not in (token_id, 0):
            raise ValueError(
                f"prompt {prompt} has {entry.logprob} for token {entry.token_id} at {position}, where its "
                f"token {token_id} was to be scored"
            )
        scores.append(entry.logprob)
    return scores


def next_logprobs(meta: wire.MetaInfo) -> dict[int, float]:
    """Token ids and log-probs of the one generated token and of its likeliest rivals.

    Raises:
        ValueError: There is not exactly one, or a log-prob is missing.
    """
    sampled = meta.output_token_logprobs or []
    if len(sampled) != 1:
        raise ValueError(f"{len(sampled)} log-probs of one generated token")
    rivals = (meta.output_top_logprobs or [None])[0] or []
    found: dict[int, float] = {}
    for entry in (*rivals, *sampled):
        if entry.logprob is None:
            raise ValueError(f"no log-prob for token {entry.token_id}")
        found[entry.token_id] = entry.logprob
    return found
