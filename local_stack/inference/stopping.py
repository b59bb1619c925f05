"""When a sequence ends, in vLLM's order: end-of-sequence token, stop token, length, stop text."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from local_stack.inference.sequences import Completion, SamplingParameters, Sequence
from local_stack.inference.text import TextCodec


@dataclass(frozen=True)
class StopRules:
    """The model's part of the decision."""

    eos_token_id: int | None
    """The main end-of-sequence token: ends a sequence without a stop reason."""
    further_eos_token_ids: frozenset[int]
    """Others that the generation config names: they count as stop tokens."""
    codec: TextCodec

    @classmethod
    def of(cls, codec: TextCodec, generation_eos: ListLike[int]) -> StopRules:
        """Combine the tokenizer's and the generation config's end-of-sequence tokens."""
        main = codec.eos_token_id
        if main is None and generation_eos:
            main = generation_eos[0]
        return cls(main, frozenset(generation_eos) - {main}, codec)

    def forbidden(self, sequence: Sequence) -> frozenset[int]:
        """Token ids that must not come next, because the minimum length is not reached."""
        parameters = sequence.request.parameters
        if len(sequence.output_ids) >= parameters.min_tokens:
            return frozenset()
        main = () if self.eos_token_id is None else (self.eos_token_id,)
        return parameters.stop_token_ids | self.further_eos_token_ids | frozenset(main)

    def apply(self, sequence: Sequence) -> None:
        """Set the finish reason if the token that was just appended ends the sequence."""
        parameters = sequence.request.parameters
        token = sequence.output_ids[-1]
        if token == self.eos_token_id and not parameters.ignore_eos:
            sequence.finish_reason = "stop"
        elif token in self._stop_tokens(parameters):
            sequence.finish_reason, sequence.stop_reason = "stop", token
        elif len(sequence.output_ids) >= parameters.max_tokens:
            sequence.finish_reason = "length"
        if parameters.stop and len(sequence.output_ids) > parameters.min_tokens:
            self._apply_stop_text(sequence)

    def completion(self, sequence: Sequence) -> Completion:
        """The finished sequence as handed to the outside."""
        text = self._text(sequence) if sequence.text is None else sequence.text
        return Completion(
            token_ids=sequence.output_ids,
            logprobs=sequence.logprobs,
            top_logprobs=sequence.top_logprobs,
            finish_reason=sequence.finish_reason or "abort",
            stop_reason=sequence.stop_reason,
            text=text,
        )

    def _stop_tokens(self, parameters: SamplingParameters) -> frozenset[int]:
        if parameters.ignore_eos:
            return parameters.stop_token_ids
        return parameters.stop_token_ids | self.further_eos_token_ids

    def _text(self, sequence: Sequence) -> str:
        parameters = sequence.request.parameters
        ids = sequence.output_ids
        ended_by_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
        if ended_by_token and not parameters.include_stop_text:
            ids = ids[:-1]
        return self.codec.decode_after(
            sequence.request.prompt_ids, ids, skip_special_tokens=parameters.skip_special_tokens
        )

    def _apply_stop_text(self, sequence: Sequence) -> None:
        parameters = sequence.request.parameters
        text = self._text(sequence)
        found = [(text.find(stop), stop) for stop in parameters.stop if stop in text]
        if found:
            position, stop = min(found)
            sequence.finish_reason, sequence.stop_reason = "stop", stop
            sequence.text = text[: position + (len(stop) if parameters.include_stop_text else 0)]
