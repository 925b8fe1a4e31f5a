"""Builds a `tokenizers.Tokenizer` from a raw vocabulary, as GGUF files and SentencePiece models hold it.

bpe_tokenizer   byte-level BPE (GGUF `tokenizer.ggml.model` = "gpt2"): tokens, merges, a named pre-tokenizer
spm_tokenizer   SentencePiece BPE (GGUF "llama", `tokenizer.model`): pieces and scores, merges derived from them
save            writes the result as a folder that `Tokenizer.open` reads back
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from slipstream.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    import tokenizers


class TokenType(IntEnum):
    """What an entry of the vocabulary is: GGUF `tokenizer.ggml.token_type`, SentencePiece's `SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: <s>, <|im_end|>
    USER_DEFINED = 4  # matched whole in the text, but ordinary text when decoded
    UNUSED = 5
    BYTE = 6  # <0x00> … <0xFF>


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION_AND_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How a family of vocabularies cuts text into words before BPE, and what else follows from its name."""

    splits: tuple[str, ...]  # regular expressions, each cutting the pieces of the one before
    nfc: bool = False  # the model's own tokenizer.json normalises to NFC (llama.cpp does not)
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # unless the file says otherwise


_DIGITS_THEN_GPT2 = _PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = _PreTokenizer((_GPT2,))
_LLAMA3_STYLE = _PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_STYLE = _PreTokenizer((_QWEN2,))
_GPT4O_STYLE = _PreTokenizer((_GPT4O,))

# From llama.cpp src/llama-vocab.cpp (llm_tokenizer_bpe and llama_vocab::impl::load), with the regular expressions it
# quotes from each tokenizer.json; `nfc` from the tokenizer classes of transformers.
PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = MappingProxyType(
    {
        "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        "gpt-2": _PLAIN_GPT2,
        "phi-2": _PLAIN_GPT2,
        "mpt": replace(_PLAIN_GPT2, nfc=True),
        "olmo": replace(_PLAIN_GPT2, nfc=True),
        "smollm": _DIGITS_THEN_GPT2,
        "starcoder": _DIGITS_THEN_GPT2,
        "refact": _DIGITS_THEN_GPT2,
        "codeshell": _DIGITS_THEN_GPT2,
        "exaone": _DIGITS_THEN_GPT2,
        "minerva-7b": _DIGITS_THEN_GPT2,
        "command-r": replace(_DIGITS_THEN_GPT2, nfc=True),
        "falcon": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
        "llama3": _LLAMA3_STYLE,
        "llama-v3": _LLAMA3_STYLE,
        "llama-bpe": _LLAMA3_STYLE,
        "falcon3": _LLAMA3_STYLE,
        "lfm2": _LLAMA3_STYLE,
        "dbrx": _PreTokenizer((_LLAMA3,)),
        "smaug-bpe": _PreTokenizer((_LLAMA3,)),
        "glm4": _PreTokenizer((_LLAMA3,)),
        "chatglm-bpe": _PreTokenizer((_LLAMA3,)),
        "qwen2": replace(_QWEN2_STYLE, nfc=True),
        "qwen35": _PreTokenizer((_QWEN35,), nfc=True),
        "deepseek-r1-qwen": _QWEN2_STYLE,
        "stablelm2": _QWEN2_STYLE,
        "hunyuan": _QWEN2_STYLE,
        "tekken": _PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
        "gpt-4o": _GPT4O_STYLE,
        "llama4": _GPT4O_STYLE,
        "deepseek-coder": _PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
        "deepseek-v3": _PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    }
)


def bpe_tokenizer(
    tokens: Sequence[str],
    merges: Sequence[str],
    pre: str,
    *,
    token_types: Sequence[int] | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
    add_bos: bool | None = None,
) -> "tokenizers.Tokenizer":
    """Byte-level BPE from the arrays of a GGUF file.

    tokens: id → token in GPT-2's byte alphabet (Ġ is a space).  merges: "left right", best first.
    pre: `tokenizer.ggml.pre`; "default" where the file has none.  token_types: a `TokenType` for each token.
    add_bos: start each encoded text with token bos_id; None asks `pre`.

    Raises UnsupportedModel for a `pre` not in PRE_TOKENIZERS, CorruptFile where the arrays contradict each other.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    family = PRE_TOKENIZERS.get(pre)
    if family is None:
        raise UnsupportedModel(
            f"The pre-tokenizer {pre!r} is not known; known ones are {', '.join(sorted(PRE_TOKENIZERS))} "
            "(or give a folder with tokenizer.json as --tokenizer_dir)."
        )
    types = _checked_types(token_types, len(tokens))
    vocab = _vocab(tokens)
    model = models.BPE(**_bpe_arguments(vocab, _parsed_merges(merges)), ignore_merges=family.ignore_merges)
    tokenizer = Tokenizer(model)
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(s), "isolated") for s in family.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, types, _ids_in_range(len(tokens), bos_id, eos_id))
    _set_bos(tokenizer, tokens, bos_id, family.add_bos if add_bos is None else add_bos)
    return tokenizer


def spm_tokenizer(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int] | None,
    *,
    unk_id: int = 0,
    bos_id: int | None = 1,
    eos_id: int | None = 2,
    add_bos: bool = True,
    add_dummy_prefix: bool = True,
    byte_fallback: bool = True,
    remove_extra_whitespaces: bool = False,
    precompiled_charsmap: bytes = b"",
) -> "tokenizers.Tokenizer":
    """SentencePiece BPE, as transformers' LlamaConverter (legacy=True) translates it.

    pieces: id → piece, ▁ is a space.  scores: the higher, the earlier a merge that makes the piece.
    types: a `TokenType` for each piece.  The defaults are Llama's; `sentencepiece.py` passes them all.

    Two known differences from the sentencepiece library: text after a special token gets the dummy prefix again (as in
    llama.cpp), and a piece marked unused is never made on the way to a longer one. Raises CorruptFile.
    """
    from tokenizers import Tokenizer, models

    kinds = _checked_types(types, len(pieces))
    if len(scores) != len(pieces):
        raise CorruptFile(f"The vocabulary has {len(pieces)} pieces but {len(scores)} scores; give one for each.")
    if not 0 <= unk_id < len(pieces):
        raise CorruptFile(f"The unknown token id {unk_id} is outside the vocabulary of {len(pieces)} pieces.")
    # SentencePiece matches user-defined pieces in text where ▁ stands for spaces, tokenizers in the text itself.
    spelled = [p.replace("▁", " ") if t == TokenType.USER_DEFINED else p for p, t in zip(pieces, kinds, strict=True)]
    vocab = _vocab(spelled)
    merges = _merges_from_scores(pieces, scores, kinds)
    model = models.BPE(
        **_bpe_arguments(vocab, merges), unk_token=pieces[unk_id], fuse_unk=True, byte_fallback=byte_fallback
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _spm_normalizer(add_dummy_prefix, remove_extra_whitespaces, precompiled_charsmap)
    tokenizer.decoder = _spm_decoder(add_dummy_prefix)
    _add_tokens(tokenizer, spelled, kinds, _ids_in_range(len(pieces), unk_id, bos_id, eos_id))
    _set_bos(tokenizer, pieces, bos_id, add_bos)
    return tokenizer


def save(
    tokenizer: "tokenizers.Tokenizer",
    folder: Path,
    *,
    bos_token: str | None,
    eos_token: str | None,
    chat_template: str | None = None,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which Tokenizer.open and transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos_token,
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def begin_with(tokenizer: "tokenizers.Tokenizer", token: str, token_id: int) -> None:
    """Make `tokenizer` start each text it encodes with special tokens with this token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, token_id)]
    )


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        index, token = next((i, t) for i, t in enumerate(tokens) if vocab[t] != i)
        raise CorruptFile(f"The vocabulary holds {token!r} twice, as tokens {index} and {vocab[token]}.")
    if not vocab:
        raise CorruptFile("The vocabulary is empty; a tokenizer needs at least one token.")
    return vocab


def _bpe_arguments(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise CorruptFile(
                    f"The merge {left + ' ' + right!r} needs the token {token!r}, which the vocabulary lacks."
                )
    return {"vocab": vocab, "merges": merges}


def _parsed_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CorruptFile(f"The merge {merge!r} is not of the form 'left right'.")
        pairs.append((left, right))
    return pairs


def _merges_from_scores(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to cut a piece in two pieces, best score first: SentencePiece merges whatever makes a piece."""
    ids = {piece: i for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind == TokenType.NORMAL}
    ranked = []
    for piece, index in ids.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        known.sort(key=lambda cut: (ids[cut[0]], ids[cut[1]]))
        ranked += [(scores[index], *cut) for cut in known]
    ranked.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in ranked]


def _spm_normalizer(add_dummy_prefix: bool, remove_extra_whitespaces: bool, charsmap: bytes) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(_charsmap_normalizer(charsmap))
    if remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def _charsmap_normalizer(charsmap: bytes) -> Any:
    from tokenizers import normalizers

    try:
        return normalizers.Precompiled(charsmap)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CorruptFile(f"The SentencePiece character map cannot be read: {error}.") from error


def _spm_decoder(add_dummy_prefix: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _checked_types(types: Sequence[int] | None, count: int) -> Sequence[int]:
    if types is None:
        return [TokenType.NORMAL] * count
    if len(types) != count:
        raise CorruptFile(f"The vocabulary has {count} tokens but {len(types)} token types; give one for each.")
    return types


def _ids_in_range(count: int, *token_ids: int | None) -> set[int]:
    for token_id in token_ids:
        if token_id is not None and not 0 <= token_id < count:
            raise CorruptFile(f"The special token id {token_id} is outside the vocabulary of {count} tokens.")
    return {token_id for token_id in token_ids if token_id is not None}


def _add_tokens(
    tokenizer: "tokenizers.Tokenizer", tokens: Sequence[str], types: Iterable[int], special_ids: set[int]
) -> None:
    from tokenizers import AddedToken

    added = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind == TokenType.CONTROL or index in special_ids
        if token and (special or kind == TokenType.USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=special))
    tokenizer.add_tokens(added)


def _set_bos(tokenizer: "tokenizers.Tokenizer", tokens: Sequence[str], bos_id: int | None, add_bos: bool) -> None:
    if not add_bos:
        return
    if bos_id is None:
        raise CorruptFile("The tokenizer is to add a beginning-of-sequence token but names none.")
    begin_with(tokenizer, tokens[bos_id], bos_id)
