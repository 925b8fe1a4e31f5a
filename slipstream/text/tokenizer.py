"""Tokenizer: a model folder's tokenizer, opened once, used by every request."""

import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.errors import CorruptFile, ModelError, RequestError

if TYPE_CHECKING:
    import tokenizers

_MIB = 1024 * 1024
_MAX_VOCABULARY_BYTES = 256 * _MIB
_MAX_CONFIG_BYTES = 16 * _MIB
_MAX_TEMPLATE_BYTES = _MIB
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back. Safe to share between threads."""

    eos_token: str | None
    bos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    chat_template: str | None  # Jinja source; render with slipstream.text.chat
    special_ids: frozenset[int]  # tokens that are no text, such as <s> or <|im_end|>
    vocab_size: int  # highest token id + 1, added tokens included; a model's logits may be padded past it

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Raises ModelError where bos_token or eos_token is not in the vocabulary."""
        backend.no_truncation()  # tokenizer.json may carry settings of a training run
        backend.no_padding()
        self._backend = backend
        self._bytes_of: dict[int, bytes] = {}
        self.bos_token, self.eos_token, self.chat_template = bos_token, eos_token, chat_template
        self.bos_token_id = self._known_id("bos_token", bos_token)
        self.eos_token_id = self._known_id("eos_token", eos_token)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Open the tokenizer of a Hugging Face model folder.

        Reads `tokenizer.json` (or, where there is none, the SentencePiece `tokenizer.model`), `tokenizer_config.json`,
        `special_tokens_map.json` and `chat_template.jinja`. Raises ModelError, or CorruptFile for a file that is
        broken or far larger than any tokenizer.
        """
        config = _read_object(folder / "tokenizer_config.json")
        fallback = _read_object(folder / "special_tokens_map.json")
        bos_token, eos_token = (
            _token_name(config.get(role)) or _token_name(fallback.get(role)) for role in ("bos_token", "eos_token")
        )
        backend, default_bos, default_eos = _open_vocabulary(folder)
        tokenizer = cls(
            backend,
            bos_token=bos_token or default_bos,
            eos_token=eos_token or default_eos,
            chat_template=_chat_template(folder, config.get("chat_template")),
        )
        if isinstance(config.get("add_bos_token"), bool):
            tokenizer._set_add_bos(config["add_bos_token"])
        return tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Names of special tokens inside the text become those tokens, as in transformers.

        add_special_tokens: also add what the model wants around a text (often a beginning-of-sequence token).
        Raises RequestError for what is no text: a string with lone surrogates.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what tokenizers makes of a lone surrogate
            raise RequestError(
                "A text to tokenize must be a string without lone surrogates; send valid UTF-8."
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with no clean-up of spaces; ids outside the vocabulary have no text."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The whole of it as the text of a tokenizer.json."""
        return self._backend.to_str()

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token ("Ġthe", "▁the", "<0x0A>"), or "" outside the vocabulary."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """The UTF-8 bytes a token adds to a text: perhaps a part of a character; b"" outside the vocabulary.

        first: as the first token of a text, where SentencePiece drops the space it put before the first word.
        """
        if first and not self._is_byte_level:
            return self._bytes(token_id, context=())
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._bytes(token_id, context=self._anchor)
        return known

    def bad_word_ids(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The token ids of `word` in the middle of a text, with and without a space before it; no special tokens.

        Made for SamplingParams.bad_words. Raises RequestError for an empty word.
        """
        if not word:
            raise RequestError("A bad word is the empty string; give at least one character.")
        bare = word.lstrip()
        variants = (bare, " " + bare) if bare else (word,)
        return tuple(dict.fromkeys(self._ids_inside_text(variant) for variant in variants))

    def _ids_inside_text(self, text: str) -> tuple[int, ...]:
        """SentencePiece puts a space before a text's first word, so look at the ids that follow a newline."""
        before = self.encode("\n", add_special_tokens=False)
        both = self.encode("\n" + text, add_special_tokens=False)
        if before and both[: len(before)] == before:
            return tuple(both[len(before) :])
        return tuple(self.encode(text, add_special_tokens=False))

    def _known_id(self, role: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelError(f"The tokenizer names {token!r} as its {role}, which is not in its vocabulary.")
        return token_id

    def _set_add_bos(self, add_bos: bool) -> None:
        from slipstream.text.vocabulary import begin_with

        adds_bos_now = self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]
        if add_bos == adds_bos_now or self.bos_token is None or self.bos_token_id is None:
            return
        if add_bos:
            begin_with(self._backend, self.bos_token, self.bos_token_id)
        else:
            self._backend.post_processor = None

    def _bytes(self, token_id: int, context: tuple[int, ...]) -> bytes:
        piece = self.token(token_id)
        if self._is_byte_level:
            return _byte_level_bytes(piece)
        byte = _BYTE_PIECE.fullmatch(piece) if "ByteFallback" in self._decoder else None
        if byte and int(byte[1], 16) >= 0x80:
            return bytes.fromhex(byte[1])
        before = self.decode(context, skip_special_tokens=False)
        return self.decode([*context, token_id], skip_special_tokens=False)[len(before) :].encode()

    @cached_property
    def _decoder(self) -> str:
        """The decoder's description, as in tokenizer.json; "" where there is none."""
        decoder = self._backend.decoder
        return "" if decoder is None else decoder.__getstate__().decode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in self._decoder

    @cached_property
    def _anchor(self) -> tuple[int, ...]:
        """One token of plain text, to stand before another that is decoded as if inside a text."""
        for letter in "aeiotn":
            token_id = self._backend.token_to_id(letter)
            if token_id is not None and self.decode([token_id]) == letter:
                return (token_id,)
        return ()


def _byte_level_bytes(piece: str) -> bytes:
    """Undo GPT-2's spelling of bytes as printable characters; like tokenizers, leave a token spelled otherwise."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte (openai/gpt-2 src/encoder.py): itself if printable, else from U+0100 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _open_vocabulary(folder: Path) -> tuple["tokenizers.Tokenizer", str | None, str | None]:
    """Returns the tokenizer, and the bos and eos tokens if the vocabulary file itself names them."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return Backend.from_str(_read_text(path, _MAX_VOCABULARY_BYTES)), None, None
        except CorruptFile:
            raise
        except Exception as error:  # tokenizers raises bare Exceptions
            raise CorruptFile(
                f"{path} is not a tokenizer ({_one_line(error)}); give a folder with a working one as --tokenizer_dir."
            ) from error
    path = folder / "tokenizer.model"
    if not path.exists():
        raise ModelError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model; give a folder that does as --tokenizer_dir."
        )
    from slipstream.text.sentencepiece import read_sentencepiece

    model = read_sentencepiece(path)
    bos_token, eos_token = (None if i is None else model.pieces[i] for i in (model.bos_id, model.eos_id))
    return model.tokenizer(add_bos=True), bos_token, eos_token


def _chat_template(folder: Path, configured: Any) -> str | None:
    """chat_template.jinja first, as in transformers; of several named templates the one called "default"."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return _read_text(path, _MAX_TEMPLATE_BYTES)
    if isinstance(configured, list):
        named = [entry for entry in configured if isinstance(entry, dict)]
        configured = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if configured is None:
        return None
    path = folder / "tokenizer_config.json"
    if not isinstance(configured, str):
        raise CorruptFile(f"chat_template in {path} is a {type(configured).__name__}; it must be Jinja source text.")
    if len(configured) > _MAX_TEMPLATE_BYTES:
        raise CorruptFile(f"chat_template in {path} has {len(configured)} characters, above {_MAX_TEMPLATE_BYTES}.")
    return configured


def _token_name(value: Any) -> str | None:
    """A special token is written as its text or as a serialised AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not JSON ({_one_line(error)}); download it again.") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{path} holds a {type(value).__name__}; it must be a JSON object.")
    return value


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CorruptFile(f"{path} has {size} bytes; such a file has at most {max_bytes}.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} cannot be read as UTF-8 text ({_one_line(error)}).") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
