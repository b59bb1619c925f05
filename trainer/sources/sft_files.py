"""Texts to train on, made into groups of one sequence: what `atropos-sft-gen` writes.

That command keeps the best answers of each group as text, so that tokens, log-probs and the other answers are
gone. What is left is supervised fine-tuning: every token of the completion has advantage 1. A text with a
score of 0 or less, as in the samples of an evaluation, is no example of anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schemas import IGNORE_INDEX
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_example(line: dict[str, Any]) -> bool:
    """Whether a line is one to learn from: it has no score, or one above 0."""
    score = line.get("score")
    return not isinstance(score, int | float) or score > 0


def encode_supervised(line: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Make a group of a line, to be trained with advantage 1 on its completion.

    Args:
        line: {"prefix", "completion", "score"}, the text as decoded with special tokens; or {"messages",
            "score"}, of which the last message is trained on.
        tokenizer: The model's.

    Returns:
        A group as the Atropos API sends it, n = 1.

    Raises:
        DataError: The texts are none, or the tokenizer's chat template does not take the messages.
    """
    if "messages" in line:
        prefix, tokens = _encode_messages(line["messages"], tokenizer)
    elif not (isinstance(line["prefix"], str) and isinstance(line["completion"], str)):
        raise DataError("prefix and completion must be texts")
    else:
        # Apart, because the sampled tokens began where the completion does.
        prefix = _encode_text(line["prefix"], tokenizer)
        tokens = prefix + _encode_text(line["completion"], tokenizer)
    trained = len(tokens) - len(prefix)
    return {
        "tokens": [tokens],
        "masks": [[IGNORE_INDEX] * len(prefix) + tokens[len(prefix) :]],
        "scores": [line.get("score", 0.0)],
        "advantages": [[0.0] * len(prefix) + [1.0] * trained],
    }


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _encode_messages(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise DataError("the recording holds chat messages and the model's tokenizer has no chat template")
    try:
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs of their own and raise what they like
        raise DataError(f"the chat template does not take the recorded messages: {error}") from error
    if whole == before:
        raise DataError("the chat template writes nothing for the last message")
    if not whole.startswith(before):
        raise DataError(
            "the chat template changes earlier messages when the last one is added: its tokens cannot be "
            "told apart from the prompt; record groups with data_path_to_save_groups instead"
        )
    prefix = _encode_text(before, tokenizer)
    return prefix, prefix + _encode_text(whole[len(before) :], tokenizer)
