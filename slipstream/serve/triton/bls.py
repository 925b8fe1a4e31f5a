"""The model `tensorrt_llm_bls`: preprocessing, tensorrt_llm and postprocessing called one after another.

Unlike the ensemble it notices that a client of a stream cancels, and has tensorrt_llm stop working for it.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from slipstream.serve.triton.wire import Inputs, Reply, Tensors, call, parameters, stream

# This model's inputs, and the names that the others have for them. The ensemble's config.pbtxt says the same.
TO_PREPROCESSING = {
    "text_input": "QUERY",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT",
    "embedding_bias_words": "EMBEDDING_BIAS_WORDS",
    "embedding_bias_weights": "EMBEDDING_BIAS_WEIGHTS",
}
TO_ENGINE = {
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
    "stream": "streaming",
} | {
    name: name
    for name in (
        "end_id", "pad_id", "temperature", "repetition_penalty", "min_length", "presence_penalty", "frequency_penalty",
        "random_seed", "return_log_probs", "return_context_logits", "return_generation_logits", "beam_width",
    )
}  # fmt: skip
PREPARED = {  # preprocessing's outputs as inputs of tensorrt_llm
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "BAD_WORDS_IDS": "bad_words_list",
    "STOP_WORDS_IDS": "stop_words_list",
    "EMBEDDING_BIAS": "embedding_bias",
}
GENERATED = {  # tensorrt_llm's outputs as inputs of postprocessing
    "output_ids": "TOKENS_BATCH",
    "sequence_length": "SEQUENCE_LENGTH",
    "cum_log_probs": "CUM_LOG_PROBS",
    "output_log_probs": "OUTPUT_LOG_PROBS",
}
ANSWER = {"OUTPUT": "text_output", "OUT_CUM_LOG_PROBS": "cum_log_probs", "OUT_OUTPUT_LOG_PROBS": "output_log_probs"}


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        self._accumulates = parameters(args)["accumulate_tokens"].lower() == "true"
        self._names = (f"bls-{secrets.token_hex(4)}-{number}" for number in count())

    def execute(self, requests: Sequence[Any]) -> None:
        """One at a time: calls from several threads now and then crash the process. More instances serve more."""
        for request in requests:
            self._run(next(self._names), Inputs(request), Reply(request))

    def _run(self, name: str, inputs: Inputs, reply: Reply) -> None:
        try:
            inputs.refuse_parameters()
            given = inputs.given()
            is_stream = bool(inputs.one("stream"))
            for answer in self._answers(given, name):
                reply.send(answer, is_last=not is_stream)
                if is_stream and reply.is_cancelled:
                    list(stream("tensorrt_llm", _stop(), list(GENERATED), name))
                    break
            reply.close()
        except Exception as error:  # of this request; the others go on
            reply.fail(error)

    def _answers(self, given: Mapping[str, np.ndarray], name: str) -> Iterator[Tensors]:
        words = {TO_PREPROCESSING[each]: array for each, array in given.items() if each in TO_PREPROCESSING}
        prepared = call("preprocessing", words, list(PREPARED))
        values = {PREPARED[each]: array for each, array in prepared.items()}
        values |= {TO_ENGINE[each]: array for each, array in given.items() if each in TO_ENGINE}
        said: dict[str, np.ndarray] = {}
        for generated in stream("tensorrt_llm", values, list(GENERATED), name):
            said = _joined(said, generated) if self._accumulates and said else generated
            tokens = {GENERATED[each]: array for each, array in said.items()}
            answer = call("postprocessing", tokens, list(ANSWER))
            yield {ANSWER[each]: array for each, array in answer.items()}


def _joined(before: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A stream's tokens so far, which is one sequence, with those of one more response."""
    by_token = {name: np.concatenate([before[name], new[name]], axis=-1) for name in ("output_ids", "output_log_probs")}
    lengths = before["sequence_length"] + new["sequence_length"]
    return {**by_token, "sequence_length": lengths, "cum_log_probs": new["cum_log_probs"]}


def _stop() -> Tensors:
    """A request that ends the one of its id; what else must be there is not looked at."""
    nothing = np.zeros([1, 1], np.int32)
    return {
        "input_ids": nothing,
        "input_lengths": nothing,
        "request_output_len": nothing,
        "stop": np.ones([1, 1], np.bool_),
    }
