"""Reads a SentencePiece `tokenizer.model` into a `tokenizers.Tokenizer`.

The file is one protobuf message, `ModelProto` of google/sentencepiece `src/sentencepiece_model.proto`. The dozen fields
needed are read here, bounds checked, so that neither `sentencepiece` nor `protobuf` has to be installed.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.text.vocabulary import TokenType, spm_tokenizer

if TYPE_CHECKING:
    import tokenizers

MAX_MODEL_BYTES = 64 * 1024 * 1024
_BPE = 2  # TrainerSpec.ModelType; UNIGRAM = 1 is the default


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields of ModelProto that decide how text is tokenized."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    is_bpe: bool
    byte_fallback: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    precompiled_charsmap: bytes

    def tokenizer(self, add_bos: bool) -> "tokenizers.Tokenizer":
        return spm_tokenizer(
            self.pieces,
            self.scores,
            self.types,
            unk_id=self.unk_id,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            add_bos=add_bos and self.bos_id is not None,
            add_dummy_prefix=self.add_dummy_prefix,
            byte_fallback=self.byte_fallback,
            remove_extra_whitespaces=self.remove_extra_whitespaces,
            precompiled_charsmap=self.precompiled_charsmap,
        )


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises CorruptFile for bytes that are no SentencePiece model, UnsupportedModel for one that is not BPE."""
    try:
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise CorruptFile(f"{path} has {size} bytes; a SentencePiece model has at most {MAX_MODEL_BYTES}.")
        model = _parse(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise CorruptFile(f"{path} cannot be read as a SentencePiece model: {error}.") from error
    if not model.pieces:
        raise CorruptFile(f"{path} holds no pieces; give a folder with a working tokenizer as --tokenizer_dir.")
    if not model.is_bpe:
        raise UnsupportedModel(
            f"{path} is a SentencePiece model but not BPE; give a folder with its tokenizer.json as --tokenizer_dir."
        )
    return model


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    bos_id, eos_id = _signed(trainer.get(41, 1)), _signed(trainer.get(42, 2))
    return SentencePieceModel(
        pieces=tuple(piece for piece, _, _ in pieces),
        scores=tuple(score for _, score, _ in pieces),
        types=tuple(kind for _, _, kind in pieces),
        is_bpe=_signed(trainer.get(3, 1)) == _BPE,
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=bos_id if bos_id >= 0 else None,
        eos_id=eos_id if eos_id >= 0 else None,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        precompiled_charsmap=_as_bytes(normalizer.get(2, b"")),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    score = struct.unpack("<f", _as_bytes(fields.get(2, b"\0\0\0\0")))[0]
    return _as_bytes(fields.get(1, b"")).decode("utf-8"), score, _signed(fields.get(3, TokenType.NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of one protobuf message: varints as integers, all else as bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"protobuf wire type {wire_type} at byte {position} is not known")
        if position + length > len(data):
            raise ValueError(f"a field of {length} bytes at byte {position} runs past the end")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"the number before byte {position} is too long")


def _signed(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a number field holds bytes")
    return value - (1 << 64) if value >= 1 << 63 else value


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a message field holds a number")
    return value
