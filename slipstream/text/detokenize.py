"""Detokenizer: turns the token ids of one stream into text as they arrive."""

import codecs
from collections.abc import Sequence

from slipstream.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoding of one output, each token looked at once.

    The pieces returned by push() and finish() join to the *full decode* of the output: the bytes that its tokens add to
    the prompt's text, read as UTF-8 with U+FFFD for each ill-formed sequence.

    - For byte-level BPE that is exactly `tokenizer.decode(output_ids)`.
    - For SentencePiece it is what `tokenizer.decode(prompt_ids + output_ids)` has beyond the prompt's text, so the
      space of a first word is kept if the prompt has text and dropped if it has none. One difference: in a run of byte
      tokens that is not valid UTF-8, tokenizers replaces every byte of the run, which would take back characters
      already sent; here those stay and only the ill-formed sequences are replaced.

    A character whose bytes are not all known is held back, so U+FFFD is never sent for a character yet to be completed.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._at_start = all(token_id in self._skipped for token_id in prompt_token_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens make final, often all of theirs."""
        new_bytes = bytearray()
        for token_id in token_ids:
            if token_id not in self._skipped:
                new_bytes += self._tokenizer.token_bytes(token_id, first=self._at_start)
                self._at_start = False
        return self._utf8.decode(bytes(new_bytes))

    @property
    def is_between_characters(self) -> bool:
        """No byte is held back: all that the tokens say so far has been returned."""
        return not self._utf8.getstate()[0]

    def finish(self) -> str:
        """Call once, at the end of the output. Returns U+FFFD if it ends inside a character, else ""."""
        return self._utf8.decode(b"", final=True)
