"""Completion: one sequence's TokenEvents become text, cut at the first stop string."""

from slipstream.schema.request import FinishReason, TokenEvent, TokenLogprobs
from slipstream.schema.sampling import SamplingParams
from slipstream.text.detokenize import Detokenizer
from slipstream.text.stop import StopMatcher
from slipstream.text.tokenizer import Tokenizer


class Completion:
    """What a sequence has said so far. Whoever opened the stream owns it; without a tokenizer `text` stays empty.

    `finish_reason` may be set before the engine has ended the sequence: a stop string was found in the text, and the
    caller should abort the request (`stopped_by_text`).
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.cumulative_logprob: float | None = None  # sum over the tokens, where logprobs were asked for
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None  # the token id or string that ended it, where one did
        self.error: str | None = None
        self.stopped_by_text = False
        self._sampling = sampling
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, sampling.skip_special_tokens)
        self._matcher = StopMatcher(tuple(sampling.stop), sampling.include_stop_str_in_output)

    def push(self, event: TokenEvent) -> str:
        """Take in one step; returns the text that became final with it."""
        if self.finish_reason is not None:
            return ""  # the engine was a step ahead of a stop string
        new_text = ""
        for index, token_id in enumerate(event.token_ids):
            self.token_ids.append(token_id)
            if event.logprobs:
                self.logprobs.append(event.logprobs[index])
                self.cumulative_logprob = (self.cumulative_logprob or 0.0) + event.logprobs[index].logprob
            if token_id != event.stop_token_id or self._sampling.include_stop_str_in_output:
                new_text += self._push_token(token_id)
            if self.stopped_by_text:
                break
        if event.finish_reason is not None and not self.stopped_by_text:
            self.error = event.error
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_token_id
            new_text += self._flush()
        self.text += new_text
        return new_text

    def _push_token(self, token_id: int) -> str:
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.push([token_id])
        if len(self.token_ids) <= self._sampling.min_tokens:
            return text  # a stop string may not begin before min_tokens
        return self._match(text)

    def _match(self, text: str) -> str:
        text = self._matcher.push(text)
        self._note_match()
        return text

    def _note_match(self) -> None:
        if self._matcher.matched is not None:
            self.stopped_by_text = True
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._matcher.matched

    def _flush(self) -> str:
        """The end: what was held back, unless it completes a stop string after all."""
        text = self._matcher.push(self._detokenizer.finish() if self._detokenizer else "") + self._matcher.finish()
        self._note_match()
        return text
