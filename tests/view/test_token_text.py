"""What tokens read as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.view.token_text import TokenText, find_turns, load_token_text


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is a word as SentencePiece has it."""

    def id_to_token(self, id: int) -> str | None:  # noqa: A002
        return None if id > 256 else "\u2581word" if id == 256 else str(id)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "word" if list(ids) == [256] else bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_is_given_to_the_first() -> None:
    text = TokenText(Bytes(), "bytes")
    assert text.pieces(list("aé🙂".encode())) == ["a", "é", "", "🙂", "", "", ""]
    assert text.pieces([0xC3]) == ["\N{REPLACEMENT CHARACTER}"]  # cut off
    assert text.pieces([256, 999]) == [" word", "〘999〙"]


def test_turns_are_found_by_the_tokens_of_chat_templates() -> None:
    chatml = [
        "<|im_start|>",
        "user",
        "\n",
        "Hi",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        "ass",
        "istant",
        "\n",
        "Yo",
    ]
    assert find_turns(chatml) == [
        {"start": 0, "body": 3, "role": "user"},
        {"start": 6, "body": 10, "role": "assistant"},
    ]
    llama = ["<|start_header_id|>", "system", "<|end_header_id|>", "\n\n", "Be"]
    assert find_turns(llama) == [{"start": 0, "body": 3, "role": "system"}]
    assert find_turns(["<|im_start|>"]) == []


def test_the_tokenizer_is_that_of_the_run_and_the_hub_is_not_asked(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    found = load_token_text(tmp_path, {"path": str(tiny_model_directory)})
    assert found.decodes
    assert "".join(found.pieces([72, 105])) == "".join(found.pieces([72])) + "".join(found.pieces([105]))
    missing = load_token_text(tmp_path, {"path": "nobody/has-this-model"})
    assert not missing.decodes
    (tmp_path / "tokenizer.json").write_text("nonsense")
    assert not load_token_text(tmp_path, {}, tmp_path).decodes
