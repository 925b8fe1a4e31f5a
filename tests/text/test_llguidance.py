"""A tokenizer's JSON, as guided decoding reads it: each token's bytes are those that the tokenizer adds to a text."""

import pytest
from llguidance import LLTokenizer

from slipstream.text.tokenizer import Tokenizer

NEVER_IN_TEXT = b"\xff"  # with which llguidance marks special tokens


@pytest.mark.parametrize("name", ["smollm2", "spm"])
def test_it_has_the_bytes_of_every_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    read = LLTokenizer(tokenizer.to_json())
    assert read.vocab_size == tokenizer.vocab_size
    for token_id in range(tokenizer.vocab_size):
        if token_id in tokenizer.special_ids:
            assert read.is_special_token(token_id)
        else:
            expected = tokenizer.token_bytes(token_id)
            assert read.decode_bytes([token_id]) == (b"" if expected == NEVER_IN_TEXT else expected)
