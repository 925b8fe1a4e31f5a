"""What TGI's protocol says of outputs: whole, or a token at a time."""

from collections.abc import Iterator
from typing import Any

from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.schema.request import TokenLogprobs
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.frontend import RequestFailed
from slipstream.serve.tgi.fields import ParameterFields
from slipstream.text.detokenize import Detokenizer
from slipstream.text.tokenizer import Tokenizer


class Answer:
    """One call's answer: whole() at the end, or events() of each output on the way."""

    def __init__(self, inputs: str, wanted: ParameterFields, sampling: SamplingParams, tokenizer: Tokenizer) -> None:
        self._prefix = inputs if wanted.return_full_text else ""
        self._wanted, self._sampling, self._tokenizer = wanted, sampling, tokenizer
        self._sent: _Tokens | None = None

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        best, *others = sorted(output.outputs, key=_mean_logprob, reverse=True)
        answer: dict[str, Any] = {"generated_text": self._text(best)}
        if self._wanted.has_details:
            answer["details"] = self._details(best, output)
            if others:
                answer["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(other), **self._details(other, output)} for other in others
                ]
        return answer

    def events(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """One a token that has not been sent; the last of all has the text and details."""
        (completion,) = output.outputs
        if self._sent is None:
            self._sent = _Tokens(self._tokenizer, output.prompt_token_ids)
        first = self._sent.num_shown
        for index, (token, top) in enumerate(self._sent.new(completion), first + 1):
            event: dict[str, Any] = {"index": index, "token": token}
            if self._wanted.top_n_tokens:
                event["top_tokens"] = top
            is_last = completion.finish_reason is not None and index == len(completion.token_ids)
            event["generated_text"] = self._text(completion) if is_last else None
            event["details"] = None
            if is_last and self._wanted.details:
                event["details"] = self._ending(completion) | {"input_length": len(output.prompt_token_ids)}
            yield event

    def _text(self, completion: CompletionOutput) -> str:
        return self._prefix + completion.text

    def _ending(self, completion: CompletionOutput) -> dict[str, Any]:
        is_random = self._wanted.samples
        return {
            "finish_reason": _finish_reason(completion),
            "generated_tokens": len(completion.token_ids),
            "seed": (self._sampling.seed or 0) + completion.index if is_random else None,
        }

    def _details(self, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        shown = list(_Tokens(self._tokenizer, output.prompt_token_ids).new(completion))
        details = self._ending(completion) | {"prefill": self._prefill(output), "tokens": [token for token, _ in shown]}
        if self._wanted.top_n_tokens:
            details["top_tokens"] = [top for _, top in shown]
        return details

    def _prefill(self, output: RequestOutput) -> list[dict[str, Any]]:
        if output.prompt_logprobs is None:
            return []
        return [
            {
                "id": token_id,
                "text": _text_of(self._tokenizer, token_id),
                "logprob": None if entry is None else entry.logprob,
            }
            for token_id, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        ]


class _Tokens:
    """A completion's tokens with their texts, which join to its text; each is shown once."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=False)
        self.num_shown = 0

    def new(self, completion: CompletionOutput) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(the token, the likeliest ones at its place) of each that has come since the last time."""
        ids, entries = completion.token_ids, completion.logprobs or ()
        for token_id, entry in zip(ids[self.num_shown :], entries[self.num_shown :], strict=False):
            self.num_shown += 1
            text = self._detokenizer.push([token_id])
            if completion.finish_reason is not None and self.num_shown == len(ids):
                text += self._detokenizer.finish()
            yield self._token(token_id, entry.logprob, text), self._top(entry)

    def _top(self, entry: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._token(token_id, logprob, _text_of(self._tokenizer, token_id)) for token_id, logprob in entry.top]

    def _token(self, token_id: int, logprob: float, text: str) -> dict[str, Any]:
        is_special = token_id in self._tokenizer.special_ids
        return {"id": token_id, "text": text, "logprob": logprob, "special": is_special}


def _text_of(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _mean_logprob(completion: CompletionOutput) -> float:
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))


def _finish_reason(completion: CompletionOutput) -> str:
    match completion.finish_reason, completion.stop_reason:
        case "length", _:
            return "length"
        case "stop", str():
            return "stop_sequence"
        case "stop", _:
            return "eos_token"
    raise RequestFailed(f"the generation was not finished ({completion.finish_reason}).")
