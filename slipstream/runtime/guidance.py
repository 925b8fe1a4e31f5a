"""Guidance: grammars compiled against the vocabulary, and the masks of what may come next. It is llguidance inside.

    prepare         any thread, before a request is queued: compiles, or refuses in a sentence
    start           a matcher of one sequence, at the end of what it has said
    keep_allowed    the other tokens of its row become -inf; the end of sequence may come where the grammar may end

A mask is a bit a token, made on the host (for all rows in parallel, outside Python's lock) while the device computes.

Shape suffixes: R rows of logits, V vocabulary, N rows that are guided, W words of 32 tokens, X 32 * W.
"""

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.errors import RequestError
from slipstream.runtime.transfer import on_device
from slipstream.schema.guided import Guided

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_MOST_KEPT = 64  # compiled grammars
_ANY_OBJECT = '{"type": "object"}'
# A model that likes line breaks must not go on with them for ever.
_JSON_LAYOUT: "JsonCompileOptions" = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}
_REGEX_SYNTAX = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")


class Guidance:
    """One vocabulary's grammars. Opened with the first guided request; safe to share between threads."""

    def __init__(self, read_tokenizer: Callable[[], str] | None, eos_token_ids: Iterable[int]) -> None:
        """read_tokenizer: the text of a tokenizer.json; None where there is no tokenizer."""
        self._read_tokenizer, self._eos_token_ids = read_tokenizer, sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._compiled: dict[Guided, LLMatcher] = {}  # the oldest first
        self._opening, self._looking = threading.Lock(), threading.Lock()  # neither is held while a grammar compiles

    def prepare(self, guided: Guided) -> None:
        """Compile it, for `start` to find. Raises RequestError for what cannot be followed."""
        with self._looking:
            if guided in self._compiled:
                return
        matcher = self._compile(guided)
        if matcher.is_error():
            raise RequestError(f"guided.{guided.kind} cannot be followed: {_why(matcher)}.")
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        if trial.is_error():
            raise RequestError(
                f"guided.{guided.kind} matches no text that this model's tokens can write; give one that does."
            )
        self._keep(guided, matcher)

    def start(self, guided: Guided, token_ids: Iterable[int] = ()) -> "LLMatcher":
        """A matcher after these output tokens. It never raises: what fails shows when a token is consumed."""
        with self._looking:
            compiled = self._compiled.get(guided)
        matcher = (compiled or self._keep(guided, self._compile(guided))).deep_copy()
        matcher.consume_tokens(list(token_ids))
        return matcher

    def keep_allowed(self, logits_RV: Tensor, matchers: Mapping[int, "LLMatcher"]) -> None:
        """In place, by row: -inf for all tokens that its matcher does not take."""
        assert self._tokenizer is not None and self._executor is not None, "a matcher came from elsewhere"
        num_words = -(-self._tokenizer.vocab_size // 32)
        bits_NW = torch.zeros((len(matchers), num_words), dtype=torch.int32, pin_memory=logits_RV.is_cuda)
        tasks = [(matcher, place) for place, matcher in enumerate(matchers.values())]
        self._executor.unsafe_compute_mask_ptr(tasks, bits_NW.data_ptr(), num_words * 4, len(tasks))
        rows_N = on_device(list(matchers), torch.int64, logits_RV.device)
        shifts_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
        bits_NW = bits_NW.to(logits_RV.device, non_blocking=True)
        is_allowed_NX = (bits_NW[:, :, None] >> shifts_32 & 1).flatten(1).bool()
        # Logits are often padded to a round number; where the tokenizer has more, this cuts them off.
        is_allowed_NV = functional.pad(is_allowed_NX, (0, logits_RV.shape[1] - is_allowed_NX.shape[1]))
        logits_RV[rows_N] = logits_RV[rows_N].where(is_allowed_NV, -torch.inf)

    def _compile(self, guided: Guided) -> "LLMatcher":
        tokenizer = self._opened()  # first: it says how to install what is imported next
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(tokenizer, _llguidance_grammar(guided), log_level=0, limits=limits)

    def _keep(self, guided: Guided, matcher: "LLMatcher") -> "LLMatcher":
        with self._looking:
            self._compiled[guided] = matcher
            if len(self._compiled) > _MOST_KEPT:
                del self._compiled[next(iter(self._compiled))]
        return matcher

    def _opened(self) -> "LLTokenizer":
        with self._opening:
            if self._tokenizer is None:
                self._tokenizer, self._executor = self._open()
            return self._tokenizer

    def _open(self) -> "tuple[LLTokenizer, LLExecutor]":
        if self._read_tokenizer is None:
            raise RequestError("guided needs a tokenizer, and this model has none; give one with --tokenizer_dir.")
        if not self._eos_token_ids:
            raise RequestError(
                "guided needs a token that ends a text, and this model has none; name it as eos_token_id in the "
                "model's config.json and build again."
            )
        try:
            from llguidance import LLExecutor, LLTokenizer
        except ModuleNotFoundError:
            raise RequestError("guided needs the package llguidance; pip install 'slipstream[guided]'.") from None
        try:
            return LLTokenizer(self._read_tokenizer(), eos_token=self._eos_token_ids), LLExecutor()
        except ValueError as error:
            raise RequestError(
                f"guided cannot read this model's tokenizer ({_one_line(str(error))}); give another one as tokenizer."
            ) from error


def num_taken(matcher: "LLMatcher", token_ids: Sequence[int]) -> int:
    """How many of these tokens it would consume, one after the other; it is left as it is."""
    trial = matcher.deep_copy()
    return next(
        (index for index, token_id in enumerate(token_ids) if not trial.consume_token(token_id)), len(token_ids)
    )


def why_stopped(matcher: "LLMatcher") -> str:
    """Of a matcher that did not take a token."""
    return f"guided cannot go on from here: {_why(matcher)}"


def _llguidance_grammar(guided: Guided) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if guided.regex is not None:
        return LLMatcher.grammar_from_regex(guided.regex)
    if guided.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(_REGEX_SYNTAX.sub(r"\\\g<0>", each) for each in guided.choice))
    if guided.grammar is not None:
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(guided.grammar))
        except Exception as error:  # its converter raises bare Exceptions, and recurses as deep as the grammar
            raise RequestError(f"guided.grammar is no GBNF: {_one_line(str(error))}; give Lark or GBNF.") from error
    schema = _ANY_OBJECT if guided.json_object else guided.json_schema
    assert isinstance(schema, str)
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_LAYOUT)
    except ValueError as error:  # NaN, or deeper than its reader goes
        raise RequestError(f"guided.{guided.kind} cannot be followed: {_one_line(str(error))}.") from error


def _why(matcher: "LLMatcher") -> str:
    """llguidance's reason without its dump of the parser's state: the line that says "error:", or the first."""
    lines = matcher.get_error().split("\n<")[0].splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    return _one_line(said[0] if said else "no token may come next")


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")[:200]
