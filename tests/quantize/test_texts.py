"""Texts to calibrate and judge with: pieces of one length that begin as the model's texts do, none of them in both."""

import pytest

from slipstream.errors import ModelError
from slipstream.quantize.texts import cut

BOS = 1


def encode(text: str) -> list[int]:
    return [BOS, *(10 + ord(letter) for letter in text)]


def test_each_piece_begins_as_a_text_does() -> None:
    texts = cut(["abcdefgh", "uvwxyz"], encode, num_calibration=2, num_held_out=2, length=4, seed=0)
    pieces = [*texts.calibration.tolist(), *texts.held_out.tolist()]
    said = {"".join(chr(token - 10) for token in piece[1:]) for piece in pieces}
    assert {piece[0] for piece in pieces} == {BOS}
    assert said == {"abc", "def", "uvw", "xyz"}


def test_a_model_without_a_first_token_has_whole_pieces() -> None:
    texts = cut(["abcdefgh"], lambda text: encode(text)[1:], num_calibration=0, num_held_out=2, length=4, seed=0)
    assert sorted(texts.held_out[:, 0].tolist()) == [10 + ord("a"), 10 + ord("e")]


def test_too_little_text_is_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"has 2 pieces of 4 tokens and 3 are needed; give a longer --calib_dataset"):
        cut(["abcdefgh"], encode, num_calibration=2, num_held_out=1, length=4, seed=0)
