"""Makes what verification asks: texts to score, and a passage to go on from.

The texts are several, and varied, so that every layer and much of the vocabulary has a say: prose,
arithmetic, code, names, another script, and the beginning of a chat. About thirty tokens each: long enough
for positions to matter, and together cheaper than a single training sequence.

The passage is asked along the path that generation takes, because that is where the prefix cache is: it is
longer than the largest block that engines cache as a whole (vLLM on the CPU: 128 tokens), so that blocks
which old weights computed would be used again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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

BUILT_IN_TOKENS = 32
"""The built-in texts are cut here: more tokens found no broken tensor more."""

PASSAGE = (
    "Minutes of the harbour board, 14 March 1987. Present: Ms Okafor (chair), Mr Lindqvist, Dr Haddad. "
    "The dredging of basin C will cost 2,350,000 kroner, 12% more than planned; the board asks for a "
    "second offer by 1 May. The ferry to the island leaves at 07:40 from June to August, otherwise at 08:15. "
    "A pupil from the town wrote a small program that predicts the tide, and it is off by less than four "
    "centimetres; the board thanks her. El capitán del remolcador pide permiso para entrar de noche. Any "
    "other business: the lamp on the northern mole has been dark since Tuesday, because nobody knows whose "
    "ladder may be borrowed. The chair closed the meeting at half past nine and walked home along the quay. "
)
"""The passage to go on from; repeated if a tokenizer makes too few tokens of it."""

CUTS = (130, 132, 134, 136)
"""The passage's lengths, in tokens, after which the next token is asked for. The shortest still holds a
whole block of 128; several, because four positions say more than one."""

SHORTEST_CUT = 8
"""In a context that is too short for `CUTS` the passage is cut to fit; below this it is left out."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Token ids of everything that verification asks."""

    texts: list[list[int]]
    """Scored token by token; each has at least 2."""
    passage: list[int]
    """Asked for its next token at every cut; empty: generation is not asked."""
    cuts: tuple[int, ...] = ()
    """Lengths of the passage's beginnings, ascending."""

    @property
    def prompts(self) -> list[list[int]]:
        """The passage's beginnings, shortest first."""
        return [self.passage[:cut] for cut in self.cuts]


def make_probes(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None, *, context: int | None = None
) -> Probes:
    """Return the probes as token ids.

    Args:
        tokenizer: The model's.
        texts: `publish.probes` of the configuration; None: the built-in ones.
        context: Longest sequence, in tokens, that the server takes; None: long enough for all.

    Raises:
        ConfigurationError: A text has fewer than two tokens: its first token has no log-prob.
    """
    # A server generates one token after the passage, and it may count that into its context.
    room = max(CUTS) if context is None else min(max(CUTS), context - 1)
    cuts = tuple(cut - max(CUTS) + room for cut in CUTS)
    if cuts[0] < SHORTEST_CUT:
        cuts = ()
    return Probes(
        texts=_scored_texts(tokenizer, texts, longest=max(room, 2)),
        passage=_passage(tokenizer, cuts[-1]) if cuts else [],
        cuts=cuts,
    )


def _scored_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, *, longest: int
) -> list[list[int]]:
    longest = min(longest, BUILT_IN_TOKENS if texts is None else MAX_TOKENS)
    probes = [tokenizer.encode(text)[:longest] for text in (TEXTS if texts is None else texts)]
    if texts is None and tokenizer.chat_template is not None:
        probes += [chat[:longest] for chat in [_chat(tokenizer)] if len(chat) > 1]
    for number, probe in enumerate(probes):
        if len(probe) < 2:
            raise ConfigurationError(
                f"publish.probes[{number}] has {len(probe)} tokens; a probe needs at least 2"
            )
    if not probes:
        raise ConfigurationError("publish.probes is empty; remove it to use the built-in texts")
    return probes


def _chat(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning of a chat; nothing where the model's template cannot write it."""
    conversation = [{"role": "user", "content": CHAT}]
    try:
        chat = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(chat) if chat.strip() else []
    except Exception as error:  # noqa: BLE001 - templates are programs of their own and raise what they like
        logger.warning("The model's chat template fails (%s): verification goes without a chat", error)
        return []


def _passage(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    tokens: list[int] = tokenizer.encode(PASSAGE)
    while len(tokens) < length:
        tokens = tokens + tokens
    return tokens[:length]
