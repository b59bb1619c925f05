"""One group of rollouts: several sampled answers to one prompt, scored together (``ScoredData`` upstream).

Who produces it: an environment, by ``POST /scored_data``. Who reads it: the trainer, inside ``GET /batch``.
Everything per token is **token-aligned**: column ``t`` of every array speaks of token ``t``.

Non-goals: limits on sizes (they belong to the trainer's configuration), tensors, advantages from scores.

Speed: a batch carries half a million tokens, so no Python expression is evaluated per token. pydantic looks
at types; everything else is checked on the flat memory (:class:`schemas.FlatGroup`) that tensors are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Self

from pydantic import AllowInfNan, Field, PrivateAttr, model_validator

from schemas._flat import (
    IGNORE_INDEX,
    LARGEST_TOKEN_ID,
    FlatGroup,
    first_positive,
    flatten_floats,
    flatten_mask,
    flatten_tokens,
)
from schemas._wire import EmptyMeansNone, WireModel

LOGPROB_SLACK: Final = 1e-6
"""Largest log-prob accepted: float32 rounding of ``log_softmax`` can overshoot by about 1e-7."""

_LARGEST_FLOAT32: Final = 3.4028234663852886e38

# fail_fast: report the first bad number of a list, not half a million of them.
TokenId = Annotated[int, Field(ge=0, le=LARGEST_TOKEN_ID)]
# The trainer computes in float32: a finite double beyond its range would become infinite there.
FiniteFloat = Annotated[float, AllowInfNan(False), Field(ge=-_LARGEST_FLOAT32, le=_LARGEST_FLOAT32)]
_IntRow = Annotated[list[int], Field(fail_fast=True)]
_CandidateRow = Annotated[list[TokenId], Field(fail_fast=True)]
_FloatRow = Annotated[list[FiniteFloat], Field(fail_fast=True)]
_OptionalFloatRows = Annotated[Annotated[list[_FloatRow], Field(fail_fast=True)] | None, EmptyMeansNone()]
_OptionalDict = Annotated[dict[str, Any] | None, EmptyMeansNone()]


class ScoredGroup(WireModel):
    """A group of ``n`` scored token sequences, validated.

    Shapes: ``n`` sequences, sequence ``i`` has ``T_i`` tokens (sequences need not have one length).

    Worked example: a 3-token prompt that is not trained on, answered with 2 and with 1 sampled tokens::

        tokens             = [[11, 12, 13, 40, 2],          [11, 12, 13, 2]]
        masks              = [[-100, -100, -100, 40, 2],    [-100, -100, -100, 2]]
        inference_logprobs = [[1.0, 1.0, 1.0, -0.7, -0.1],  [1.0, 1.0, 1.0, -2.3]]
        scores             = [1.0, 0.0]

    Raises:
        pydantic.ValidationError: If anything is not as described; see :func:`schemas.first_problem`.
    """

    # The range of token ids is checked while they are flattened, which costs a tenth of pydantic's ge and le.
    tokens: Annotated[list[_IntRow], Field(fail_fast=True, min_length=1)]
    """[n][T_i] token ids of prompt and answer, in the environment's tokenizer."""
    masks: Annotated[list[_IntRow], Field(fail_fast=True)]
    """[n][T_i] -100 where the token is not trained on, else the token id itself.

    Masks of 0 and 1 are recognised, converted to this convention, and reported by `masks_were_binary`."""
    scores: Annotated[list[FiniteFloat], Field(fail_fast=True)]
    """[n] reward of each sequence, in the environment's own scale."""
    advantages: _OptionalFloatRows = None
    """[n][T_i] token-level advantages computed by the environment. None: derive them from the scores."""
    ref_logprobs: _OptionalFloatRows = None
    """[n][T_i] log-probs of a reference model, 1.0 where masked. None: no reference."""
    inference_logprobs: _OptionalFloatRows = None
    """[n][T_i] log-probs of the model that sampled the tokens, 1.0 where masked. None: not recorded."""
    messages: Annotated[list[Any] | None, EmptyMeansNone()] = None
    """[n] the conversations as text, for people. Never trained on, so its shape is not checked."""
    generation_params: _OptionalDict = None
    """Sampling settings of the group, for example ``{"temperature": 0.7}``. None: not recorded."""
    overrides: Annotated[
        Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None,
        EmptyMeansNone(),
    ] = None
    """[n] per-sequence wishes of the environment: ``set_advantage_to_zero``, ``temperature``."""
    group_overrides: _OptionalDict = None
    """Wishes of the environment for the whole group, for example ``temperature``."""
    images: Annotated[Any, EmptyMeansNone()] = None
    """Images of a multimodal group, as the environment sent them; not checked."""
    env_id: int | None = None
    """Number that the API gave to the environment. None: the environment never registered."""
    distill_token_ids: Annotated[
        Annotated[list[Annotated[list[_CandidateRow], Field(fail_fast=True)]], Field(fail_fast=True)] | None,
        EmptyMeansNone(),
    ] = None
    """[n][T_i][k] the teacher's candidate tokens at each position. None: no distillation."""
    distill_logprobs: Annotated[
        Annotated[list[Annotated[list[_FloatRow], Field(fail_fast=True)]], Field(fail_fast=True)] | None,
        EmptyMeansNone(),
    ] = None
    """[n][T_i][k] the teacher's log-probs of those candidates. None: no distillation."""
    _masks_were_binary: bool = PrivateAttr(default=False)
    _flat: FlatGroup | None = PrivateAttr(default=None)

    @property
    def masks_were_binary(self) -> bool:
        """Whether the environment sent masks of 0 and 1, which were converted to -100 and token ids."""
        return self._masks_were_binary

    @property
    def sequence_count(self) -> int:
        """Number of sequences ``n``."""
        return len(self.tokens)

    @property
    def token_count(self) -> int:
        """Number of tokens of all sequences, trained on or not."""
        return sum(map(len, self.tokens))

    @property
    def trained_token_count(self) -> int:
        """Number of tokens that are trained on."""
        return self.token_count - sum(row.count(IGNORE_INDEX) for row in self.masks)

    @property
    def flat(self) -> FlatGroup:
        """The same per-token fields as plain memory, for tensors."""
        # A group made without validation (model_construct) is validated here.
        return self._flat if self._flat is not None else self._check()

    @model_validator(mode="after")
    def _check_and_convert(self) -> Self:
        self._flat = self._check()
        return self

    def _check(self) -> FlatGroup:
        """Check all that types do not say, converting binary masks on the way."""
        lengths = [len(row) for row in self.tokens]
        if 0 in lengths:
            raise ValueError(f"tokens[{lengths.index(0)}] is empty: every sequence needs at least one token")
        tokens = flatten_tokens(self.tokens)
        _check_rows("masks", self.masks, lengths)
        _check_count("scores", self.scores, len(lengths))
        if self.overrides is not None:
            _check_count("overrides", self.overrides, len(lengths))
        if self.advantages is not None:
            _check_rows("advantages", self.advantages, lengths)
        masks = self._flatten_masks(tokens)
        ref_logprobs = self._flatten_logprobs("ref_logprobs", masks, lengths)
        inference_logprobs = self._flatten_logprobs("inference_logprobs", masks, lengths)
        self._check_distillation(lengths)
        return FlatGroup(
            lengths=lengths,
            tokens=b"".join(tokens),
            masks=b"".join(masks),
            advantages=None if self.advantages is None else b"".join(map(flatten_floats, self.advantages)),
            ref_logprobs=ref_logprobs,
            inference_logprobs=inference_logprobs,
        )

    def _flatten_masks(self, tokens: list[bytes]) -> list[bytes]:
        """Accept -100/token masks, convert 0/1 masks, refuse anything else."""
        flat = [flatten_mask(mask, row) for mask, row in zip(self.masks, tokens, strict=True)]
        if None in flat:
            self._convert_binary_masks(bad_row=flat.index(None))
            flat = [flatten_mask(mask, row) for mask, row in zip(self.masks, tokens, strict=True)]
        return [mask for mask in flat if mask is not None]

    def _convert_binary_masks(self, *, bad_row: int) -> None:
        if not set().union(*self.masks) <= {0, 1}:
            mask, row = self.masks[bad_row], self.tokens[bad_row]
            column = next(t for t, m in enumerate(mask) if m not in (IGNORE_INDEX, row[t]))
            raise ValueError(
                f"masks[{bad_row}][{column}] is {mask[column]}; it must be {IGNORE_INDEX} (not trained on) "
                f"or the token id {row[column]}"
            )
        converted = [
            [token if trained else IGNORE_INDEX for token, trained in zip(row, mask, strict=True)]
            for row, mask in zip(self.tokens, self.masks, strict=True)
        ]
        # The model is frozen for its users; this is still construction.
        object.__setattr__(self, "masks", converted)
        self._masks_were_binary = True

    def _flatten_logprobs(self, name: str, masks: list[bytes], lengths: list[int]) -> bytes | None:
        """Refuse log-probs above 0 at trained positions.

        Environments fill positions without a log-prob with 1.0. That is right where the mask is -100; at a
        trained position it means that the log-prob is missing, and training on it would do silent damage.
        """
        rows: list[list[float]] | None = getattr(self, name)
        if rows is None:
            return None
        _check_rows(name, rows, lengths)
        flat = [flatten_floats(row) for row in rows]
        for i, row in enumerate(rows):
            column = first_positive(row, flat[i], masks[i], slack=LOGPROB_SLACK)
            if column is not None:
                raise ValueError(
                    f"{name}[{i}][{column}] is {row[column]} at a trained position; a log-prob is at most 0 "
                    "(1.0 is the filler for masked positions: the environment did not record this one)"
                )
        return b"".join(flat)

    def _check_distillation(self, lengths: list[int]) -> None:
        """Both distillation fields or none, equal in every dimension."""
        ids, logprobs = self.distill_token_ids, self.distill_logprobs
        if ids is None and logprobs is None:
            return
        if ids is None or logprobs is None:
            missing = "distill_token_ids" if ids is None else "distill_logprobs"
            raise ValueError(f"{missing} is missing: distillation needs both distill fields")
        _check_rows("distill_token_ids", ids, lengths)
        _check_rows("distill_logprobs", logprobs, lengths)
        for i, (id_row, logprob_row) in enumerate(zip(ids, logprobs, strict=True)):
            if list(map(len, id_row)) != list(map(len, logprob_row)):
                raise ValueError(
                    f"distill_token_ids[{i}] and distill_logprobs[{i}] differ in candidates per position"
                )


def _check_count(name: str, values: Sequence[object], expected: int) -> None:
    """Refuse a per-sequence list that has not one entry per sequence."""
    if len(values) != expected:
        raise ValueError(f"{name} has {len(values)} entries but tokens has {expected} sequences")


def _check_rows(name: str, rows: Sequence[Sequence[object]], lengths: list[int]) -> None:
    """Refuse a per-token field that has not one entry per token of every sequence."""
    _check_count(name, rows, len(lengths))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(row) != length:
            raise ValueError(f"tokens[{i}] has {length} entries but {name}[{i}] has {len(row)}")
