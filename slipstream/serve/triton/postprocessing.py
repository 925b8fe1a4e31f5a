"""The model `postprocessing`: token ids become text, each response by itself.

The model tensorrt_llm ends its responses between characters, so a piece of a stream never has half of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slipstream.errors import RequestError
from slipstream.serve.triton.preprocessing import open_tokenizer
from slipstream.serve.triton.wire import Inputs, Tensors, answer_each
from slipstream.text.detokenize import Detokenizer

_SOME_TEXT = (-1,)  # a prompt that is more than special tokens


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        self._tokenizer = open_tokenizer(args)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer_each(requests, self._answer)

    def _answer(self, inputs: Inputs) -> Tensors:
        tokens, lengths = inputs.array("TOKENS_BATCH"), inputs.array("SEQUENCE_LENGTH")
        assert tokens is not None and lengths is not None  # not optional in config.pbtxt
        if tokens.ndim != 3 or tokens.shape[0] != 1 or lengths.size != tokens.shape[1]:
            raise RequestError(
                f"TOKENS_BATCH has the shape {list(tokens.shape)} and SEQUENCE_LENGTH {list(lengths.shape)}; they must "
                "be [1, beams, tokens] and [1, beams]."
            )
        texts = [
            self._text(row[: max(0, length)])
            for row, length in zip(tokens[0].tolist(), lengths.reshape(-1).tolist(), strict=True)
        ]
        cumulative, of_tokens = inputs.array("CUM_LOG_PROBS"), inputs.array("OUTPUT_LOG_PROBS")
        assert cumulative is not None and of_tokens is not None
        return {
            "OUTPUT": np.array([[text.encode() for text in texts]], np.object_),
            "OUT_CUM_LOG_PROBS": cumulative,
            "OUT_OUTPUT_LOG_PROBS": of_tokens,
        }

    def _text(self, token_ids: list[int]) -> str:
        """As inside a text, unless the tokens begin one: SentencePiece drops the first space of a text alone."""
        begins_text = token_ids[:1] == [self._tokenizer.bos_token_id]
        detokenizer = Detokenizer(self._tokenizer, () if begins_text else _SOME_TEXT)
        return detokenizer.push(token_ids) + detokenizer.finish()
