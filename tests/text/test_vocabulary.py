"""Tokenizers made from raw vocabularies give the ids of transformers and of the sentencepiece library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.text.sentencepiece import read_sentencepiece
from slipstream.text.tokenizer import Tokenizer
from slipstream.text.vocabulary import PRE_TOKENIZERS, TokenType, bpe_tokenizer, save, spm_tokenizer

WORDS = [
    "",
    " ",
    "Hello",
    " Hello",
    "Hello world",
    "Hello  world",
    "   leading and trailing   ",
    "tabs\tand\t\ttabs",
    "one\ntwo\n\nthree\n\n\n",
    "line\r\nwindows\r\n",
    " \n \n  x",
    "I'm you're they've it's we'll he'd DON'T",
    "def f(x):\n    return x * (x - y) if x else None\n",
    "for (int i = n; i < m; i++) { a[i] += b; }",
    "<html><body class='x'>&amp;</body></html>",
    "SELECT * FROM t WHERE a = 'b' AND c IS NOT NULL;",
    "https://example.com/a/b?c=d&e=f#g",
    "ünïcödé çà et là ß Æ œ",
    "e\u0301 decomposed and é composed",
    "Привет, мир! Как дела?",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！我在学习中文。",
    "日本語のテキスト、カタカナ・ひらがな",
    "안녕하세요 세계",
    "😀😃 emoji 👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽",
    "mixed 语言 text с разными アルファベット",
    "∑ ∫ √ ≤ ≥ ≠ → ⇒ ∞",
    "“quotes” ‘single’ — dash … ellipsis",
    "zero\u200bwidth \u00a0nbsp \u3000ideographic",
    "a" * 200,
    " " * 50,
    "!?.,;:-_()[]{}@#$%^&*~`|\\/\"'",
    "CamelCaseWords and snake_case_words and kebab-case-words",
    "ALL CAPS TEXT",
    "\ufffd replacement",
    "\x00\x01\x7f control",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x<|im_end|>y",
    " <|endoftext|> ",
    "<|im_start|><|im_start|>",
    "<|not_special|>",
    "<file_sep>code<filename>a.py",
    "ｆｕｌｌｗｉｄｔｈ",
    "ǅ titlecase ʰ modifier",
]
WITH_DIGITS = ["123", "a 1 b", "in 2024, 3.14 and 1,000,000", "x²  ½ Ⅻ ٣", "v1.2.3-rc4", "12:34:56"]


@pytest.fixture(scope="module")
def oracle(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.real_model
def test_smollm2_ids_equal_transformers(smollm2: Tokenizer, oracle: Any) -> None:
    for text in WORDS:
        ids = smollm2.encode(text)
        assert ids == oracle.encode(text), text
        assert smollm2.decode(ids, skip_special_tokens=False) == text


@pytest.mark.real_model
def test_smollm2_cuts_numbers_into_digits(smollm2: Tokenizer, oracle: Any) -> None:
    """transformers 5 does not know GGUF's pre-tokenizer "smollm" and takes GPT-2's, which leaves numbers whole.

    The model's own tokenizer.json has Sequence[Digits(individual_digits=True), ByteLevel(use_regex=True)], and
    llama.cpp agrees; so give the oracle that. (No merge of this vocabulary joins two digits, so the two rarely differ.)
    """
    from tokenizers import pre_tokenizers

    guessed = oracle.backend_tokenizer.pre_tokenizer
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    try:
        for text in WORDS + WITH_DIGITS:
            assert smollm2.encode(text) == oracle.encode(text), text
    finally:
        oracle.backend_tokenizer.pre_tokenizer = guessed
    assert [smollm2.token(i) for i in smollm2.encode("a 123")] == ["a", "Ġ", "1", "2", "3"]


@pytest.mark.real_model
def test_save_and_open_again(smollm2_backend: Any, smollm2: Tokenizer, tmp_path: Path) -> None:
    save(smollm2_backend, tmp_path, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template="{{ 1 }}")
    opened = Tokenizer.open(tmp_path)
    assert (opened.bos_token_id, opened.eos_token_id, opened.vocab_size) == (1, 2, 49152)
    assert opened.special_ids == smollm2.special_ids == frozenset(range(17))
    assert opened.chat_template == "{{ 1 }}"
    assert [opened.encode(text) for text in WITH_DIGITS] == [smollm2.encode(text) for text in WITH_DIGITS]


BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_each_pre_tokenizer_keeps_the_text(pre: str) -> None:
    tokens = [*BYTES, "he", "<s>"]
    tokenizer = bpe_tokenizer(tokens, ["h e"], pre, bos_id=len(tokens) - 1, eos_id=len(tokens) - 1)
    for text in ["he said: I'll pay $1234 for x²!\r\n\n  你好 caf\u00e9`s", *WORDS, *WITH_DIGITS]:
        decoded = tokenizer.decode(tokenizer.encode(text).ids)
        assert decoded == text or PRE_TOKENIZERS[pre].nfc
    begins_with_bos = tokenizer.encode("he").ids[0] == len(tokens) - 1
    assert begins_with_bos == PRE_TOKENIZERS[pre].add_bos


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "I'LL pay 12345 now!\n\n", ["I", "'LL", "Ġpay", "Ġ", "123", "45", "Ġnow", "!ĊĊ"]),
        ("qwen2", "I'll pay 12 now", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "Ġnow"]),
        ("gpt-2", "I'll pay 12345  now", ["I", "'ll", "Ġpay", "Ġ12345", "Ġ", "Ġnow"]),
        ("smollm", "pay 12", ["pay", "Ġ", "1", "2"]),
        ("tekken", "CamelCase HTTPServer 12", ["Camel", "Case", "ĠHTTPServer", "Ġ", "1", "2"]),
        ("gpt-4o", "CamelCase's 1234", ["Camel", "Case's", "Ġ", "123", "4"]),
        ("deepseek-v3", "x 1234\u4f60!a", ["x", "Ġ", "123", "4", "ä½ł", "!a"]),
        ("falcon", "a$b 12345", ["a", "$", "b", "Ġ", "123", "45"]),
    ],
)
def test_pre_tokenizers_cut_as_documented(pre: str, text: str, words: list[str]) -> None:
    cut = bpe_tokenizer(BYTES, [], pre, add_bos=False).pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in cut] == words


def test_contradictions_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"'made-up' is not known; known ones are .*smollm"):
        bpe_tokenizer(["a"], [], "made-up")
    with pytest.raises(CorruptFile, match="holds 'a' twice, as tokens 0 and 2"):
        bpe_tokenizer(["a", "b", "a"], [], "gpt-2")
    with pytest.raises(CorruptFile, match="'ab' is not of the form"):
        bpe_tokenizer(["a", "b"], ["ab"], "gpt-2")
    with pytest.raises(CorruptFile, match="needs the token 'ab', which the vocabulary lacks"):
        bpe_tokenizer(["a", "b"], ["a b"], "gpt-2")
    with pytest.raises(CorruptFile, match="2 tokens but 1 token types"):
        bpe_tokenizer(["a", "b"], [], "gpt-2", token_types=[1])
    with pytest.raises(CorruptFile, match="special token id 7 is outside the vocabulary of 1"):
        bpe_tokenizer(["a"], [], "gpt-2", eos_id=7)
    with pytest.raises(CorruptFile, match="names none"):
        bpe_tokenizer(["a"], [], "llama-bpe")
    with pytest.raises(CorruptFile, match="1 pieces but 0 scores"):
        spm_tokenizer(["<unk>"], [], None)
    with pytest.raises(CorruptFile, match="unknown token id 3"):
        spm_tokenizer(["<unk>"], [0.0], None, unk_id=3)
    with pytest.raises(CorruptFile, match="vocabulary is empty"):
        bpe_tokenizer([], [], "gpt-2")


SPM_TEXTS = [
    "The quick brown fox: the tokens that often become others.",
    *WORDS[1:39],
    *WITH_DIGITS,
    "the<tool>other",
    "<0x41> literal",
    "▁literal",
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False, "vocab_size": 200},
    ],
    ids=str,
)
def test_sentencepiece_ids_equal_the_library(
    tmp_path: Path, train_spm: Callable[..., Path], options: dict[str, Any]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = train_spm(tmp_path / "tokenizer.model", user_defined_symbols=[], **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.open(tmp_path)
    for text in SPM_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text), text
        if options.get("byte_fallback", True):
            assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text)), text
    assert tokenizer.encode("the")[0] == tokenizer.bos_token_id == library.bos_id()
    assert tokenizer.eos_token_id == library.eos_id()
    assert tokenizer.vocab_size == library.vocab_size()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("the odgan 12"), max_size=40)
)
def test_sentencepiece_ids_equal_the_library_on_any_text(spm_model: Path, spm: Tokenizer, text: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    assert spm.encode(text, add_special_tokens=False) == library.encode(text)


def test_sentencepiece_reads_every_field(spm_model: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    model = read_sentencepiece(spm_model)
    ids = range(library.vocab_size())
    assert list(model.pieces) == [library.id_to_piece(i) for i in ids]
    assert list(model.scores) == [library.get_score(i) for i in ids]
    assert [kind == TokenType.BYTE for kind in model.types] == [library.is_byte(i) for i in ids]
    assert [kind == TokenType.CONTROL for kind in model.types] == [library.is_control(i) for i in ids]
    assert TokenType.USER_DEFINED in model.types


def test_user_defined_spaces_match_longest_first() -> None:
    """Gemma's runs of spaces are user-defined pieces; GGUF spells them with spaces, SentencePiece with ▁."""
    for two, four in (("  ", "    "), ("▁▁", "▁▁▁▁")):
        pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", two, four]
        types = [2, 3, 3, 1, 1, 1, 4, 4]
        tokenizer = spm_tokenizer(pieces, [0.0] * 8, types, add_bos=False, add_dummy_prefix=False, byte_fallback=False)
        assert tokenizer.encode("a    a   b").ids == [4, 7, 4, 6, 3, 5]
        assert tokenizer.decode([4, 7, 4, 6, 3, 5]) == "a    a   b"


def test_broken_sentencepiece_models_are_refused(spm_model: Path, tmp_path: Path) -> None:
    data = spm_model.read_bytes()
    broken = tmp_path / "tokenizer.model"
    for bad in (b"", data[:1000], b"\x0a\xff\xff\xff\x7f", b"\xff" * 40, b"\x0b" + data, b"\x08\x01" + data):
        broken.write_bytes(bad)
        with pytest.raises(CorruptFile, match=r"tokenizer\.model"):
            read_sentencepiece(broken)


def test_unigram_is_refused_by_name(tmp_path: Path, train_spm: Callable[..., Path]) -> None:
    path = train_spm(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=330)
    with pytest.raises(UnsupportedModel, match="--tokenizer_dir"):
        read_sentencepiece(path)
