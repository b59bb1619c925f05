"""Text to token ids and back, for every thread of the server."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from local_stack.inference.errors import RequestRefused

_CONTEXT_TOKENS = 6
"""How many prompt tokens are decoded along, so that the first generated piece keeps its leading space."""


class TextCodec:
    """The model's tokenizer and chat template. Thread-safe.

    Args:
        model: Directory or hub id of the model.
    """

    def __init__(self, model: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        # A fast tokenizer refuses to be used by two threads at once ("Already borrowed").
        self._lock = threading.Lock()

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token."""
        value: int | None = self._tokenizer.eos_token_id
        return value

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        with self._lock:
            ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation rendered with the chat template.

        Raises:
            RequestRefused: The model has no chat template, or the template refuses the conversation.
        """
        import jinja2  # the template language of transformers; only needed where there is a template

        with self._lock:
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except (ValueError, TypeError, jinja2.TemplateError) as error:
                raise RequestRefused(f"the chat template cannot render this: {error}") from error
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of some token ids."""
        with self._lock:
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def decode_after(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> str:
        """Text that `token_ids` add after a prompt."""
        context = list(prompt_ids[-_CONTEXT_TOKENS:])
        before = self.decode(context, skip_special_tokens=skip_special_tokens)
        both = self.decode([*context, *token_ids], skip_special_tokens=skip_special_tokens)
        if both.startswith(before):
            return both[len(before) :]
        # The prompt ended inside a character that only became readable now.
        return self.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """Text of every token by itself."""
        return [self.decode([token_id]) for token_id in token_ids]
