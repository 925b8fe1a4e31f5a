"""The tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model of ours.

Where lm-eval leaves a choice to the model, it is that of its HFLM, so that numbers may be laid beside others'.
"""

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from slipstream.api.llm import LLM
from slipstream.api.outputs import RequestOutput
from slipstream.errors import ModelError, RequestError, UsageError
from slipstream.progress import progress_bar
from slipstream.schema.sampling import SamplingParams
from slipstream.text.chat import render_chat

AT_ONCE = 256  # requests, whose outputs are held: a prompt's logprobs are an object a token
NO_TASKS = TaskManager(include_defaults=False)  # where they are open already: to list lm-eval's own takes 7 s
SCORING = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
ABOUT_ALL = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")  # of lm-eval's results


def open_tasks(names: Sequence[str], folder: Path | None = None) -> list[Any]:
    """The tasks and groups of these names, their data loaded. folder: of task files, instead of lm-eval's own.

    Raises UsageError for a name that none has, and for a task that cannot be loaded or is not for text alone.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks_dir {folder} is not a folder; give one with lm-eval task files (.yaml) in it.")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    found: list[Any] = []
    for name in names:
        matching = manager.match_tasks([name])  # a * stands for anything, as in lm-eval
        if not matching:
            near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.3)
            raise UsageError(
                f"--tasks {name!r} is no task of {folder or 'lm-eval'}; "
                f"{'the nearest are ' + ', '.join(near) if near else 'those of lm-eval need no --tasks_dir'}."
            )
        for each in matching:
            found += _load(manager, each)
    try:
        NO_TASKS.load(found)
    except ValueError as error:
        raise UsageError(f"--tasks {','.join(names)} name a task twice ({error}); leave one of them out.") from None
    return found


def _load(manager: Any, name: str) -> list[Any]:
    try:
        loaded = manager.load(name)
    except Exception as error:  # whatever a file says, or asks a hub for
        raise UsageError(
            f"--tasks {name} cannot be loaded ({type(error).__name__}: {error}); leave it out, or mend its file or the "
            "network."
        ) from error
    for task_name, task in loaded["tasks"].items():
        for what in ("UNSAFE_CODE", "MULTIMODAL"):
            if getattr(task, what, False):
                raise UsageError(
                    f"--tasks {task_name} is marked {what} in lm-eval, which is not supported here; leave it out."
                )
    group = loaded["groups"].get(name)
    return [*loaded["tasks"].values()] if group is None else [group]


def evaluate_tasks(
    llm: LLM, tasks: Sequence[Any], *, num_fewshot: int | None, limit: int | None, apply_chat_template: bool
) -> dict[str, Any]:
    """lm-eval's results, without the samples. tasks: as open_tasks found them. limit: documents of each task."""
    results = simple_evaluate(
        SlipstreamLM(llm), tasks=list(tasks), num_fewshot=num_fewshot, limit=limit,
        apply_chat_template=apply_chat_template, log_samples=False, task_manager=NO_TASKS,
    )  # fmt: skip
    return {"lm_eval": lm_eval.__version__, **{name: results[name] for name in ABOUT_ALL if name in results}}


def metrics_of(results: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(task, metric) → "0.6000 ± 0.1633", in lm-eval's order; a metric with a filter is "exact_match, strict-match"."""
    rows = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            error = found.get(f"{metric}_stderr,{filter_name}")
            if isinstance(error, float):  # "N/A" where there is none
                shown += f" ± {error:.4f}"
            rows[task, metric if filter_name == "none" else f"{metric}, {filter_name}"] = shown
    return rows


class SlipstreamLM(TemplateLM):
    """An LLM as lm-eval wants its models."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm
        self._tokenizer = llm.tokenizer
        self.max_length = llm.runtime_config.max_seq_len

    # --- texts and tokens ---

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        found = self._tokenizer.bos_token_id
        if found is None:
            found = self.eot_token_id
        if found is None:
            raise ModelError(
                f"{self.llm.manifest.name} has no token for the beginning or end of a text, and this task needs one "
                "as the context of a first token; choose another task."
            )
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written the first one
            first = self._tokenizer.bos_token
            add_special_tokens = first is None or not string.startswith(first)
        return self._tokenizer.encode(string, add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        return self.llm.manifest.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llm.request_maker.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = render_chat(
            self.llm.request_maker.chat_template, chat_history, bos_token=self._tokenizer.bos_token,
            eos_token=self._tokenizer.eos_token, add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()  # an answer that goes on: without what the template ends it with
        return text[: text.rindex(begun) + len(begun)]

    # --- what is asked of a model ---

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """requests: (texts, tokens of the context, tokens whose logprobs are wanted). From the left, what does not
        fit is cut. Returns their sums, and whether each token is the most likely one."""
        longest = self.max_length - 1  # the engine adds a token
        prompts = []
        for texts, context, continuation in requests:
            if not continuation:
                raise RequestError(
                    f"The tokenizer makes one token of the end of a context and {texts[1]!r}, so that it has no "
                    "logprob of its own; begin it with a space in the task's file."
                )
            prompts.append([*(context or [self.prefix_token_id]), *continuation][-longest:])
        answers = []
        for output, (_, _, continuation) in zip(self._outputs(prompts, SCORING), requests, strict=True):
            assert output.prompt_logprobs is not None
            scored = [each for each in output.prompt_logprobs[-len(continuation) :] if each is not None]
            answers.append((math.fsum(each.logprob for each in scored), all(each.rank == 1 for each in scored)))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap but for a token, where one does not fit."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 2, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for context, kwargs in (request.args for request in requests):
            sampling = self._sampling(kwargs)
            room = self.max_length - (sampling.max_tokens or 0)
            prompts.append(self.tok_encode(context)[-max(room, 1) :])
            params.append(sampling)
        return [output.outputs[0].text for output in self._outputs(prompts, params)]

    def _sampling(self, kwargs: dict[str, Any]) -> SamplingParams:
        """kwargs: a task's generation_kwargs. Raises RequestError for what has no meaning here."""
        wanted = dict(normalize_gen_kwargs(kwargs))  # greedy unless do_sample; at most 256 tokens unless it says more
        wanted.setdefault("temperature", 1.0 if wanted["do_sample"] else 0.0)
        del wanted["do_sample"]
        stop = handle_stop_sequences(wanted.pop("until"), eos=self._tokenizer.eos_token)
        max_tokens = wanted.pop("max_gen_toks")
        try:
            return SamplingParams(
                max_tokens=max_tokens, stop=[each for each in stop if each], skip_special_tokens=False, **wanted
            )
        except TypeError:
            raise RequestError(
                f"generation_kwargs of a task are {kwargs!r}; besides until, max_gen_toks and do_sample they may be "
                "fields of SamplingParams, such as temperature and top_p."
            ) from None

    def _outputs(
        self, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[RequestOutput]:
        """In order. Raises RequestError where one could not be run."""
        with progress_bar() as progress:
            for start in range(0, len(prompts), AT_ONCE):
                here = slice(start, start + AT_ONCE)
                for output in self.llm.generate(
                    prompts[here], params if isinstance(params, SamplingParams) else params[here]
                ):
                    if output.error is not None:
                        raise RequestError(output.error)
                    yield output
                progress("evaluate", min(start + AT_ONCE, len(prompts)), len(prompts))
