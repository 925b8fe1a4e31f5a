"""The model `preprocessing`: a prompt and lists of words become token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.errors import RequestError, UsageError
from slipstream.serve.triton.wire import Inputs, Tensors, answer_each, parameters
from slipstream.serve.triton.words import pack_words
from slipstream.text.tokenizer import Tokenizer


def open_tokenizer(args: Mapping[str, str]) -> Tokenizer:
    """As the keys tokenizer_dir and tokenizer_type of a config.pbtxt say. Raises UsageError or ModelError."""
    values = parameters(args)
    if values["tokenizer_type"] != "auto":
        raise UsageError(f"tokenizer_type is {values['tokenizer_type']!r}; it must be auto, which reads all kinds.")
    return Tokenizer.open(Path(values["tokenizer_dir"]))


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        self._tokenizer = open_tokenizer(args)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer_each(requests, self._answer)

    def _answer(self, inputs: Inputs) -> Tensors:
        inputs.refuse_parameters()
        tokenizer = self._tokenizer
        token_ids = tokenizer.encode(inputs.text("QUERY"))
        if not token_ids:
            raise RequestError("text_input is empty; give at least one character.")
        bad_words = [ids for word in inputs.texts("BAD_WORDS_DICT") for ids in tokenizer.bad_word_ids(word)]
        stop_words = [tokenizer.encode(word, add_special_tokens=False) for word in inputs.texts("STOP_WORDS_DICT")]
        return {
            "INPUT_ID": np.array([token_ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(token_ids)]], np.int32),
            "REQUEST_OUTPUT_LEN": np.array([[inputs.one("REQUEST_OUTPUT_LEN")]], np.int32),
            "BAD_WORDS_IDS": pack_words(bad_words),
            "STOP_WORDS_IDS": pack_words(stop_words),
            "EMBEDDING_BIAS": self._bias(inputs),
        }

    def _bias(self, inputs: Inputs) -> np.ndarray:
        """[1, vocabulary], or one zero where there is none."""
        words = inputs.texts("EMBEDDING_BIAS_WORDS")
        given = inputs.array("EMBEDDING_BIAS_WEIGHTS")
        weights = [] if given is None else given.reshape(-1).tolist()
        if len(words) != len(weights):
            raise RequestError(
                f"embedding_bias_words has {len(words)} words and embedding_bias_weights {len(weights)}; give one each."
            )
        if not words:
            return np.zeros([1, 1], np.float32)
        bias = np.zeros([1, self._tokenizer.vocab_size], np.float32)
        for word, weight in zip(words, weights, strict=True):
            single = [ids[0] for ids in self._tokenizer.bad_word_ids(word) if len(ids) == 1]
            if not single:
                raise RequestError(f"embedding_bias_words has {word!r}, which is several tokens; give words of one.")
            bias[0, single] += weight
        return bias
