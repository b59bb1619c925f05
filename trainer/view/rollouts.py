"""Turns recorded batches into what a page shows: groups with their numbers, sequences token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, Final

from schemas import IGNORE_INDEX, BatchReply, RejectedGroup, ScoredGroup
from trainer.view.token_text import TokenText, find_turns

MOST_TOKENS: Final = 4096
"""Tokens of one sequence that are sent, if no more are asked for."""
MOST_TOKENS_OF_GROUP: Final = 1 << 18
_MOST_MESSAGES: Final = 1 << 17
_RAW_BYTES: Final = 1 << 16
"""Of a group that cannot be read, as JSON."""

SetAside = Mapping[int, str]
"""Reasons by place in the batch."""
Advantages = Mapping[int, list[float]]
"""By place of the group: one a token, its sequences one after another."""


@dataclass(frozen=True)
class GroupPlace:
    """A group and its position among all groups of its batch, unreadable ones included."""

    place: int
    group: ScoredGroup


def groups_of(reply: BatchReply) -> list[GroupPlace]:
    """Return the readable groups of a batch with their places."""
    rejected = {each.index for each in reply.rejected}
    places = (place for place in range(len(reply.batch or [])) if place not in rejected)
    return [GroupPlace(place, group) for place, group in zip(places, reply.groups, strict=True)]


def summarize(reply: BatchReply, set_aside: SetAside) -> list[dict[str, Any]]:
    """One short record a group: what a list of groups is sorted and filtered by."""
    records = [_summary(each, set_aside.get(each.place)) for each in groups_of(reply)]
    records += [
        {"group": each.index, "environment": each.env_id, "reason": each.reason} for each in reply.rejected
    ]
    return sorted(records, key=lambda record: record["group"])


def _summary(each: GroupPlace, reason: str | None) -> dict[str, Any]:
    group, scores = each.group, each.group.scores
    return {
        "group": each.place,
        "environment": group.env_id,
        "reason": reason,
        "sequences": group.sequence_count,
        "tokens": group.token_count,
        "longest": max(map(len, group.tokens)),
        "trained": group.trained_token_count,
        "best": max(scores),
        "worst": min(scores),
        "mean": _short(fmean(scores)),
        "spread": _short(pstdev(scores)),
        "scores": [_short(score) for score in scores[:32]],
    }


def detail(
    each: GroupPlace,
    text: TokenText,
    *,
    advantages: Sequence[float] | None,
    recorded: Mapping[int, Sequence[float]] | None = None,
    reason: str | None = None,
    most_tokens: int = MOST_TOKENS,
) -> dict[str, Any]:
    """Everything about a group: the prefix that its sequences share once, then each sequence's own tokens.

    Args:
        each: The group.
        text: Reads its tokens.
        advantages: One a token, the sequences one after another. None: not known.
        recorded: The trainer's log-probs of the trained tokens, by sequence, as far as the run recorded them.
        reason: Why it was set aside.
        most_tokens: Of each sequence; `cut` says how many more there are.
    """
    group = each.group
    shared = _shared_prefix(group)
    most_tokens = max(256, min(most_tokens, MOST_TOKENS_OF_GROUP // group.sequence_count))
    prefix = group.tokens[0][:shared]
    prefix_pieces = text.pieces(prefix[-most_tokens:])
    sequences, start = [], 0
    for index, tokens in enumerate(group.tokens):
        own = None if advantages is None else advantages[start + shared : start + len(tokens)]
        start += len(tokens)
        sequences.append(
            _sequence(
                group,
                index,
                text,
                shared=shared,
                advantages=own,
                recorded=(recorded or {}).get(index),
                most_tokens=most_tokens,
            )
        )
    return {
        **_summary(each, reason),
        "tokenizer": text.name,
        "decodes": text.decodes,
        "generation": _bounded(group.generation_params),
        "prefix": {
            "ids": prefix[-most_tokens:],
            "text": prefix_pieces,
            "turns": find_turns(prefix_pieces),
            "cut": max(0, shared - most_tokens),
        },
        "sequences": sequences,
    }


def _sequence(
    group: ScoredGroup,
    index: int,
    text: TokenText,
    *,
    shared: int,
    advantages: Sequence[float] | None,
    recorded: Sequence[float] | None,
    most_tokens: int,
) -> dict[str, Any]:
    tokens = group.tokens[index][shared:]
    ids = tokens[:most_tokens]
    trained = [int(mask != IGNORE_INDEX) for mask in group.masks[index][shared:]]
    sampler = group.inference_logprobs[index][shared:] if group.inference_logprobs is not None else None
    trainer = iter(recorded or ())
    # Nothing predicts a first token, whatever its mask says: no log-prob is recorded of it.
    predicted = [int(each and (shared or at)) for at, each in enumerate(trained[:most_tokens])]
    pieces = text.pieces(ids)
    override = group.overrides[index] if group.overrides is not None else None
    trained_advantages = [
        value for value, is_trained in zip(advantages or (), trained, strict=False) if is_trained
    ]
    messages = group.messages[index] if group.messages and index < len(group.messages) else None
    return {
        "index": index,
        "score": group.scores[index],
        "length": len(group.tokens[index]),
        "trained_tokens": sum(trained),
        "advantage": _short(fmean(trained_advantages)) if trained_advantages else None,
        "override": _bounded(override),
        "ids": ids,
        "text": pieces,
        "turns": find_turns(pieces),
        "trained": trained[:most_tokens],
        "sampler": _known(sampler, trained, most_tokens),
        "trainer": [_short(next(trainer, None)) if each else None for each in predicted]
        if recorded is not None
        else None,
        "advantages": None if advantages is None else [_short(each) for each in advantages[:most_tokens]],
        "messages": _bounded(messages),
        "cut": max(0, len(tokens) - most_tokens),
    }


def _known(
    logprobs: Sequence[float] | None, trained: Sequence[int], most_tokens: int
) -> list[float | None] | None:
    """The sampler's log-probs; null where the environment only filled a place."""
    if logprobs is None:
        return None
    pairs = zip(logprobs[:most_tokens], trained, strict=False)
    return [_short(value) if is_trained or value <= 0 else None for value, is_trained in pairs]


def rejected_detail(each: RejectedGroup) -> dict[str, Any]:
    """What can be shown of a group that could not be read."""
    raw = json.dumps(each.raw, indent=1, ensure_ascii=False)
    return {
        "group": each.index,
        "environment": each.env_id,
        "reason": each.reason,
        "raw": raw[:_RAW_BYTES],
        "cut": max(0, len(raw) - _RAW_BYTES),
    }


def _bounded(value: Any) -> Any:
    """What an environment sent along; None where it is as long as a book."""
    return value if len(json.dumps(value)) <= _MOST_MESSAGES else None


def _shared_prefix(group: ScoredGroup) -> int:
    """How many first tokens all sequences have, of which none trains one."""
    first = group.tokens[0]
    shared = next((at for at, mask in enumerate(group.masks[0]) if mask != IGNORE_INDEX), len(first))
    for tokens, masks in zip(group.tokens[1:], group.masks[1:], strict=True):
        shared = min(shared, len(tokens))
        while shared and tokens[:shared] != first[:shared]:
            at = next(place for place in range(shared) if tokens[place] != first[place])
            shared = at
        shared = next((at for at in range(shared) if masks[at] != IGNORE_INDEX), shared)
    return shared


def _short(value: float | None) -> float | None:
    """Six digits: more nobody reads."""
    return None if value is None else float(f"{value:.6g}")
