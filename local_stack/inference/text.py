"""Text to token ids and back, and where a sequence ends, in vLLM's order: token, length, text."""

from __future__ import annotations

import threading
from typing import Any

from transformers import AutoTokenizer

from local_stack.inference.errors import RequestRefused
from local_stack.inference.records import Sequence

_CONTEXT_TOKENS = 6
"""Number of prompt tokens decoded along, so that the first generated piece keeps its leading space."""


class TextCodec:
    """The model's tokenizer, chat template and end-of-sequence tokens. Thread-safe.

    Args:
        model: Directory or hub id of the model.
        generation_eos: End-of-sequence ids of the generation config.
    """

    def __init__(self, model: str, generation_eos: list[int]) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        # A fast tokenizer refuses to be used by two threads at once ("Already borrowed").
        self._lock = threading.Lock()
        main = self._tokenizer.eos_token_id
        if main is None and generation_eos:
            main = generation_eos[0]
        self._eos: int | None = main  # ends a sequence without a stop reason; the others count as stop tokens
        self._further_eos = frozenset(generation_eos) - {main}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
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

        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise RequestRefused(f"the chat template cannot render this: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of some token ids."""
        with self._lock:
            text: str = self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def finish(self, sequence: Sequence) -> None:
        """Set reason and text if the token that was just appended ends the sequence."""
        parameters = sequence.request.parameters
        token = sequence.output_ids[-1]
        if token == self._eos and not parameters.ignore_eos:
            sequence.finish_reason = "stop"
        elif token in parameters.stop_token_ids or (token in self._further_eos and not parameters.ignore_eos):
            sequence.finish_reason, sequence.stop_reason = "stop", token
        elif len(sequence.output_ids) >= sequence.request.max_tokens:
            sequence.finish_reason = "length"
        if parameters.stop or sequence.finish_reason:
            sequence.text = self.text(sequence)
        if found := [(sequence.text.find(stop), stop) for stop in parameters.stop if stop in sequence.text]:
            position, stop = min(found)
            sequence.finish_reason, sequence.stop_reason = "stop", stop
            sequence.text = sequence.text[:position]

    def text(self, sequence: Sequence) -> str:
        """Text that a sequence adds after its prompt, without the token that ended it."""
        ids = sequence.output_ids[:-1] if sequence.finish_reason == "stop" else sequence.output_ids
        context = sequence.request.prompt_ids[-_CONTEXT_TOKENS:]
        skip = sequence.request.parameters.skip_special_tokens
        before = self.decode(context, skip_special_tokens=skip)
        both = self.decode([*context, *ids], skip_special_tokens=skip)
        if both.startswith(before):
            return both[len(before) :]
        # The prompt ended inside a character that only became readable now.
        return self.decode(ids, skip_special_tokens=skip)
