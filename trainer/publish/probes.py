"""The texts that verification scores.

Several, and varied, so that every layer and much of the vocabulary has a say: prose, arithmetic, code,
names, another script, and the beginning of a chat. About thirty tokens each: long enough for positions to
matter, and together cheaper than a single training sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trainer.errors import ConfigurationError

CHAT = "What is the capital of France, and which river runs through it?"
"""Asked through the tokenizer's chat template, because that is how environments ask."""

TEXTS = (
    "The ship left the harbour at dawn, and by noon nobody on the shore could make out its sails any more.",
    "17 + 25 = 42, and 42 * 3 = 126. A train that covers 180 kilometres in 2.5 hours averages 72.",
    "def running_mean(values):\n    total = 0.0\n    for count, value in enumerate(values, start=1):\n",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "active": false}',
    "Le chat dort sur la chaise. Der Hund schläft unter dem Tisch. 猫が窓のそばで眠っている。",
)
"""The built-in probes, besides the chat."""

MAX_TOKENS = 64
"""A probe is cut here, so that any context length takes it and scoring stays cheap."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    chat_template: Any

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects at its start."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """The conversation as text."""
        ...


def make_probes(tokenizer: Tokenizer, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Return the probes as token ids, each of 2 to `MAX_TOKENS` tokens.

    Args:
        tokenizer: The model's.
        texts: `publish.probes` of the configuration; None: the built-in ones.

    Raises:
        ConfigurationError: A text has fewer than two tokens: its first token has no log-prob.
    """
    probes = [tokenizer.encode(text)[:MAX_TOKENS] for text in (TEXTS if texts is None else texts)]
    if texts is None and tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": CHAT}], tokenize=False, add_generation_prompt=True
        )
        probes.append(tokenizer.encode(chat)[:MAX_TOKENS])
    for number, probe in enumerate(probes):
        if len(probe) < 2:
            raise ConfigurationError(
                f"publish.probes[{number}] has {len(probe)} tokens; a probe needs at least 2"
            )
    if not probes:
        raise ConfigurationError("publish.probes is empty; remove it to use the built-in texts")
    return probes
