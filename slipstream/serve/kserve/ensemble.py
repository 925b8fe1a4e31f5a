"""The tensors of TensorRT-LLM's `ensemble` model: what each asks for here, and what the answers are.

Names and meanings are those of tensorrtllm_backend (all_models/inflight_batcher_llm/ensemble/config.pbtxt). There as
here the likeliest token is taken where neither top_k nor top_p is given. A tensor holds one value for all prompts, or
a row for each.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slipstream.api.outputs import RequestOutput
from slipstream.errors import RequestError
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.kserve.tensors import Tensor
from slipstream.text.tokenizer import Tokenizer

MAX_PROMPTS = 64  # of one call; Triton's max_batch_size in seed 001


@dataclass(frozen=True)
class Input:
    """datatype: as metadata has it; any other of its kind (whole numbers, numbers) does as well."""

    datatype: str
    is_list: bool = False  # several values a prompt
    is_optional: bool = True
    refusal: str | None = None  # why a value other than false is not taken


_NO_LOGITS = "logits are not sent; return_log_probs gives the likelihood of each token"
_NO_TABLES = "prompt tuning is not here yet"

INPUTS = {
    "text_input": Input("BYTES", is_optional=False),
    "max_tokens": Input("INT32", is_optional=False),
    "bad_words": Input("BYTES", is_list=True),
    "stop_words": Input("BYTES", is_list=True),
    "end_id": Input("INT32"),
    "pad_id": Input("INT32"),
    "top_k": Input("INT32"),
    "top_p": Input("FP32"),
    "temperature": Input("FP32"),
    "length_penalty": Input("FP32"),
    "repetition_penalty": Input("FP32"),
    "min_length": Input("INT32"),
    "presence_penalty": Input("FP32"),
    "frequency_penalty": Input("FP32"),
    "random_seed": Input("UINT64"),
    "return_log_probs": Input("BOOL"),
    "return_context_logits": Input("BOOL", refusal=_NO_LOGITS),
    "return_generation_logits": Input("BOOL", refusal=_NO_LOGITS),
    "beam_width": Input("INT32"),
    "stream": Input("BOOL"),
    "prompt_embedding_table": Input("FP16", is_list=True, refusal=_NO_TABLES),
    "prompt_vocab_size": Input("INT32", refusal=_NO_TABLES),
    "embedding_bias_words": Input("BYTES", is_list=True),
    "embedding_bias_weights": Input("FP32", is_list=True),
}
OUTPUTS = {"text_output": "BYTES", "cum_log_probs": "FP32", "output_log_probs": "FP32"}

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "BYTES": (str, "text"),
    "BOOL": (bool, "true or false"),
    "FP16": ((int, float), "a number"),
    "FP32": ((int, float), "a number"),
    "INT32": (int, "a whole number"),
    "UINT64": (int, "a whole number"),
}
_THEIR_NAMES = {"min_tokens": "min_length", "seed": "random_seed", "n": "beam_width", "best_of": "beam_width"}

Row = Mapping[str, Any]  # one prompt's values by input: one, or a list of them


def rows_of(tensors: Sequence[Tensor]) -> Sequence[Row]:
    """The values of each prompt. Raises RequestError for what is missing, unknown, refused or of the wrong type."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for name in by_name.keys() - INPUTS.keys():
        raise RequestError(f"{name} is no input of this model; it has {', '.join(INPUTS)}.")
    for name, wanted in INPUTS.items():
        if not wanted.is_optional and not (name in by_name and by_name[name].values):
            raise RequestError(f"{name} is missing; it is required.")
    num_prompts = len(by_name["text_input"].values)
    if num_prompts > MAX_PROMPTS:
        raise RequestError(f"text_input has {num_prompts} prompts; send at most {MAX_PROMPTS} at once.")
    rows: list[dict[str, Any]] = [{} for _ in range(num_prompts)]
    for tensor in tensors:
        for row, values in zip(rows, _split(tensor, num_prompts), strict=True):
            if values:
                row[tensor.name] = _checked(tensor.name, values)
    return rows


def _split(tensor: Tensor, num_rows: int) -> list[Sequence[Any]]:
    if num_rows == 1 or len(tensor.values) == 1:
        return [tensor.values] * num_rows
    if tensor.shape[0] != num_rows:
        raise RequestError(
            f"{tensor.name} has the shape {list(tensor.shape)}; for {num_rows} prompts its first dimension must be "
            f"{num_rows}, or it must hold one value."
        )
    size = len(tensor.values) // num_rows
    return [tensor.values[start : start + size] for start in range(0, len(tensor.values), size or 1)] or [()] * num_rows


def _checked(name: str, values: Sequence[Any]) -> Any:
    wanted = INPUTS[name]
    kind, words = _KINDS[wanted.datatype]
    for value in values:
        if not isinstance(value, kind) or (isinstance(value, bool) and wanted.datatype != "BOOL"):
            raise RequestError(f"{name} is {value!r}; it must be {words}.")
    if wanted.refusal is not None and any(values):
        raise RequestError(f"{name} is refused: {wanted.refusal}; leave it out.")
    if wanted.is_list:
        return list(values)
    if len(values) > 1:
        raise RequestError(f"{name} has {len(values)} values for a prompt; give one.")
    return values[0]


def sampling_of(row: Row, tokenizer: Tokenizer) -> SamplingParams:
    """Raises RequestError, in the names of the protocol."""
    num_beams, end_id = row.get("beam_width", 1), row.get("end_id")
    top_k, top_p = row.get("top_k", 0), row.get("top_p", 0.0)
    given = {
        name: row[name]
        for name in ("length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens")
        if name in row
    }
    try:
        return SamplingParams(
            **given,
            n=num_beams,
            use_beam_search=num_beams > 1,
            temperature=row.get("temperature", 1.0) if top_k or top_p else 0.0,
            top_k=top_k,
            top_p=top_p or 1.0,
            min_tokens=row.get("min_length", 0),
            seed=row.get("random_seed"),
            logprobs=0 if row.get("return_log_probs") else None,
            bad_words=[word for word in row.get("bad_words", ()) if word],
            stop=[word for word in row.get("stop_words", ()) if word],
            ignore_eos=end_id is not None,
            stop_token_ids=() if end_id in (None, -1) else (end_id,),
            logit_bias=_bias(row, tokenizer),
        )
    except RequestError as error:
        raise RequestError(_in_their_names(str(error))) from None


def _in_their_names(sentence: str) -> str:
    ours, rest = sentence.split(" ", 1)
    return f"{_THEIR_NAMES.get(ours, ours)} {rest}"


def _bias(row: Row, tokenizer: Tokenizer) -> dict[int, float] | None:
    """What is added to the logit of each token of these words."""
    words, weights = row.get("embedding_bias_words", ()), row.get("embedding_bias_weights", ())
    if len(words) != len(weights):
        raise RequestError(
            f"embedding_bias_words has {len(words)} words and embedding_bias_weights {len(weights)} weights; "
            "give as many of one as of the other."
        )
    bias: dict[int, float] = defaultdict(float)
    for word, weight in zip(words, weights, strict=True):
        for token_id in tokenizer.encode(word, add_special_tokens=False):
            bias[token_id] += weight
    return dict(bias) or None


def outputs_of(results: Sequence[RequestOutput]) -> list[Tensor]:
    """text_output [prompts, beams], and where asked for cum_log_probs [prompts, beams] and output_log_probs
    [prompts, beams, tokens], with zeros at the end of those that have fewer.
    """
    completions = [completion for result in results for completion in result.outputs]
    shape = (len(results), len(completions) // len(results))
    outputs = [Tensor("text_output", "BYTES", shape, [completion.text for completion in completions])]
    if all(completion.logprobs is None for completion in completions):
        return outputs
    rows = [[entry.logprob for entry in completion.logprobs or ()] for completion in completions]
    longest = max(map(len, rows))
    padded = [value for row in rows for value in row + [0.0] * (longest - len(row))]
    totals = [completion.cumulative_logprob or 0.0 for completion in completions]
    return [
        *outputs,
        Tensor("cum_log_probs", "FP32", shape, totals),
        Tensor("output_log_probs", "FP32", (*shape, longest), padded),
    ]


def news_of(result: RequestOutput, num_known: Sequence[int]) -> RequestOutput:
    """Of a stream: with the text that is new, and the logprobs after those many."""
    news = [
        replace(each, text=each.text_diff, logprobs=None if each.logprobs is None else each.logprobs[known:])
        for each, known in zip(result.outputs, num_known, strict=True)
    ]
    return replace(result, outputs=news)


def selected(outputs: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """Those that were asked for; all where none is named. Raises RequestError."""
    if not names:
        return list(outputs)
    by_name = {tensor.name: tensor for tensor in outputs}
    return [by_name[name] for name in names]


def check_outputs(names: Sequence[str], row: Row) -> None:
    """Raises RequestError for outputs that there are not, or not without return_log_probs."""
    for name in names:
        if name not in OUTPUTS:
            raise RequestError(f"{name} is no output of this model; it has {', '.join(OUTPUTS)}.")
        if name != "text_output" and not row.get("return_log_probs"):
            raise RequestError(f"{name} needs return_log_probs; set that to true.")
