"""TokenGroups: the tokens of a stream in groups that each decode, alone, to whole characters."""

from collections import deque

from slipstream.api.outputs import CompletionOutput
from slipstream.text.detokenize import Detokenizer
from slipstream.text.tokenizer import Tokenizer


class TokenGroups:
    """Of one completion. What all groups decode to, joined, is the completion's text: cut before a stop string, without
    the token that ended it, and nothing given out that may yet turn out to be part of a stop string.

    Without a tokenizer there is no text to respect, and tokens go as they come.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt_token_ids)
        self._num_seen = self._num_characters = 0
        self._borders: deque[tuple[int, int]] = deque()  # tokens and their characters, where a group may end
        self._num_given = self._characters_given = 0

    def take(self, output: CompletionOutput) -> list[int]:
        """The next group, from the completion as it is now; maybe empty."""
        token_ids = output.token_ids
        if token_ids and isinstance(output.stop_reason, int) and token_ids[-1] == output.stop_reason:
            token_ids = token_ids[:-1]
        self._look_at(token_ids)
        start = self._num_given
        while self._borders and (self._tokenizer is None or self._borders[0][1] <= len(output.text)):
            self._num_given, self._characters_given = self._borders.popleft()
        group = token_ids[start : self._num_given]
        if output.finish_reason is not None:
            group += self._rest(output, token_ids)
        return group

    def _look_at(self, token_ids: list[int]) -> None:
        for token_id in token_ids[self._num_seen :]:
            self._num_seen += 1
            if self._detokenizer is not None:
                self._num_characters += len(self._detokenizer.push([token_id]))
            if self._detokenizer is None or self._detokenizer.is_between_characters:
                self._borders.append((self._num_seen, self._num_characters))

    def _rest(self, output: CompletionOutput, token_ids: list[int]) -> list[int]:
        if not isinstance(output.stop_reason, str):
            return token_ids[self._num_given :]
        assert self._tokenizer is not None  # stop strings are found in text
        begun = output.text[self._characters_given :]  # of a token in which the stop string begins
        return self._tokenizer.encode(begun, add_special_tokens=False) if begun else []
