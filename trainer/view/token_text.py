"""Says what each token of a rollout reads as, with the tokenizer of the run's model; never asks the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

logger = logging.getLogger(__name__)

_UNKNOWN: Final = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER: Final = 4
"""Tokens that one character of UTF-8 may be spread over."""

_ROLE_BEGINS: Final = {
    "<|im_start|>": "\n",
    "<|start_header_id|>": "<|end_header_id|>",
    "<start_of_turn>": "\n",
    "<|start|>": "<|message|>",
    "<|turn>": "\n",
}
"""Tokens after which a chat template writes a role, and what ends it."""
_LONGEST_ROLE: Final = 12
_BARE_ROLES: Final = {
    "<|user|>": "user",
    "<|assistant|>": "assistant",
    "<|system|>": "system",
    "<\N{FULLWIDTH VERTICAL LINE}User\N{FULLWIDTH VERTICAL LINE}>": "user",
    "<\N{FULLWIDTH VERTICAL LINE}Assistant\N{FULLWIDTH VERTICAL LINE}>": "assistant",
    "[INST]": "user",
    "[/INST]": "assistant",
}
"""Tokens that are a role themselves."""


class Decoder(Protocol):
    """What is used of a tokenizer (`tokenizers.Tokenizer` has it)."""

    def id_to_token(self, id: int) -> str | None:  # noqa: A002 - the name is theirs
        """Return the vocabulary's entry."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of a sequence."""


class TokenText:
    """Turns token ids into the pieces of text that they stand for.

    Args:
        decoder: A tokenizer. None: each token reads as its number.
        name: Where it came from, for people.
    """

    def __init__(self, decoder: Decoder | None, name: str) -> None:
        self._decoder = decoder
        self.name = name
        """Where the tokenizer came from, or why there is none."""
        self._known: dict[int, str] = {}

    @property
    def decodes(self) -> bool:
        """Whether there is a tokenizer."""
        return self._decoder is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return one piece a token.

        A character that is spread over several tokens is given to the first of them; the others are empty.
        """
        if self._decoder is None:
            return [f"{each} " for each in ids]
        pieces = [self._piece(each) for each in ids]
        index = 0
        while index < len(pieces):
            if pieces[index].endswith(_UNKNOWN):
                for count in range(2, _LONGEST_CHARACTER + 1):
                    whole = self._decoder.decode(list(ids[index : index + count]), skip_special_tokens=False)
                    if not whole.endswith(_UNKNOWN):
                        count = min(count, len(pieces) - index)
                        pieces[index : index + count] = [whole, *[""] * (count - 1)]
                        break
            index += 1
        return pieces

    def _piece(self, token: int) -> str:
        known = self._known.get(token)
        if known is None:
            assert self._decoder is not None  # noqa: S101 - for the type checker
            entry = self._decoder.id_to_token(token)
            if entry is None:
                known = f"\N{LEFT WHITE TORTOISE SHELL BRACKET}{token}\N{RIGHT WHITE TORTOISE SHELL BRACKET}"
            else:
                known = self._decoder.decode([token], skip_special_tokens=False)
                # SentencePiece drops the space before a first word.
                if entry.startswith("\u2581") and not known.startswith(" "):
                    known = " " + known
            self._known[token] = known
        return known


def find_turns(pieces: Sequence[str]) -> list[dict[str, Any]]:
    """Find where a chat template begins a turn, by its tokens.

    Returns:
        For each turn `start`, its first token; `body`, the first after the role; and `role`.
    """
    turns = []
    for index, piece in enumerate(pieces):
        if piece in _BARE_ROLES:
            turns.append({"start": index, "body": index + 1, "role": _BARE_ROLES[piece]})
        elif (end := _ROLE_BEGINS.get(piece)) is not None:
            name = ""
            for after in range(index + 1, min(index + 1 + _LONGEST_ROLE, len(pieces))):
                before, found, _ = pieces[after].partition(end)
                name += before
                if found:
                    turns.append({"start": index, "body": after + 1, "role": name.strip()})
                    break
    return turns


def load_token_text(run: Path, model: dict[str, Any], tokenizer: Path | None = None) -> TokenText:
    """Load the tokenizer of a run from this machine.

    Args:
        run: The run's directory: what it published, or its final model, has the tokenizer too.
        model: Section `model` of the run's configuration; may be empty.
        tokenizer: A directory with `tokenizer.json` that wins.
    """
    named = [model.get("tokenizer_path"), model.get("path")]
    published = sorted((run / "published").glob("v*"), reverse=True)[:1]
    places = [tokenizer] if tokenizer is not None else [*named, run / "final", *published]
    for place in places:
        if not place:
            continue
        file = Path(place) / "tokenizer.json"
        if not file.is_file() and (cached := _in_cache(str(place))) is not None:
            file = cached
        if file.is_file():
            try:
                from tokenizers import Tokenizer

                return TokenText(Tokenizer.from_file(str(file)), str(place))
            except Exception as error:  # noqa: BLE001 - the library raises bare exceptions; ids are shown
                logger.warning("%s cannot be read: %s", file, error)
    return TokenText(None, "no tokenizer of the run's model is on this machine; give --tokenizer")


def _in_cache(name: str) -> Path | None:
    """Find the file of a model of the hub that was fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
