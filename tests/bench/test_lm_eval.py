"""The tasks of lm-eval: what our adapter answers is what lm-eval's own, on transformers, answers in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from slipstream import LLM
from slipstream.bench.lm_eval import NO_TASKS, SlipstreamLM, evaluate_tasks, metrics_of, open_tasks
from slipstream.errors import RequestError, UsageError
from tests.bench.lm_eval_tasks import task_folder
from tests.cli.conftest import talker

__all__ = ["talker", "task_folder"]

LONGEST = 48  # tokens of a sequence: the long texts below do not fit
LONG = "How do I count to nine in French, the second highest mountain of the world? " * 6
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),  # lm-eval moves the space
    ("", "The capital"),
    ("<|im_end|>", "another"),
    ("", "<|im_end|> another"),
    (LONG, " mountain"),
    (LONG, " mountain?" * 3),
]


@pytest.fixture(scope="module")
def ours(talker: Path) -> Iterator[SlipstreamLM]:
    with LLM(talker, max_seq_len=LONGEST, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=2048) as llm:
        yield SlipstreamLM(llm)


@pytest.fixture(scope="module")
def theirs(talker: Path) -> HFLM:
    # Two tokens less: ours count the one that is predicted last, and the one that the engine adds.
    return HFLM(pretrained=str(talker), device="cpu", dtype="float32", batch_size=1, max_length=LONGEST - 2)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_tasks_give_what_transformers_gives(ours: SlipstreamLM, theirs: HFLM, task_folder: Path) -> None:
    tasks = open_tasks(["capitals", "spell*"], task_folder)
    both = [simple_evaluate(model, tasks=tasks, task_manager=NO_TASKS) for model in (ours, theirs)]
    for task in ("capitals", "spelling"):
        for own, other in zip(*(found["samples"][task] for found in both), strict=True):
            assert own["arguments"] == other["arguments"]
            if task == "spelling":
                assert own["resps"] == other["resps"]
                continue
            for ((mine, mine_is_greedy),), ((right, is_greedy),) in zip(own["resps"], other["resps"], strict=True):
                assert mine == pytest.approx(right, abs=1e-4) and mine_is_greedy == is_greedy
    assert both[0]["results"] == both[1]["results"]
    again = evaluate_tasks(ours.llm, tasks, num_fewshot=None, limit=None, apply_chat_template=False)
    assert again["results"] == both[1]["results"] and again["n-shot"] == {"capitals": 0, "spelling": 0}
    accuracy = both[1]["results"]["capitals"]["acc,none"]
    shown = metrics_of(again)
    assert shown["capitals", "acc"].startswith(f"{accuracy:.4f} ± ")
    assert [*shown] == [("capitals", "acc"), ("capitals", "acc_norm"), ("spelling", "exact_match")]


def test_likelihoods_of_texts_with_little_context_and_too_much(ours: SlipstreamLM, theirs: HFLM) -> None:
    asked = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked)
    assert ours.loglikelihood(asked) == [(pytest.approx(logprob, abs=1e-4), greedy) for logprob, greedy in expected]
    whole = requests("loglikelihood_rolling", [(LONG,), ("The capital",)])
    assert len(ours.tok_encode(LONG)) > 2 * LONGEST
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-3)


def test_the_most_likely_continuation_is_greedy(ours: SlipstreamLM, theirs: HFLM) -> None:
    context = ours.tok_encode("The capital of France is")
    best = theirs.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
    other = [*best[:2], (best[2] + 1) % 300]
    asked = [(("", ""), context, best), (("", ""), context, other)]
    found, expected = ours._loglikelihood_tokens(asked), theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [True, False]
    assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], abs=1e-4)


@pytest.mark.parametrize(
    "kwargs", [{"until": [" "]}, {"until": "e", "max_gen_toks": 3}, {"do_sample": False, "temperature": 0.7}]
)
def test_generated_texts(ours: SlipstreamLM, theirs: HFLM, kwargs: dict[str, Any]) -> None:
    kwargs = {"max_gen_toks": 20, **kwargs}
    asked = requests("generate_until", [("The capital", kwargs), ("How do I count", kwargs)])
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_context_that_leaves_no_room_loses_its_beginning(ours: SlipstreamLM) -> None:
    kwargs = {"until": [], "max_gen_toks": 30}
    kept = ours.tok_encode(LONG)[30 - LONGEST :]
    (found,) = ours.generate_until(requests("generate_until", [(LONG, kwargs)]))
    (again,) = [each.outputs[0].text for each in ours._outputs([kept], ours._sampling(kwargs))]
    assert found == again


def test_sampling_asks_for_what_a_task_says(ours: SlipstreamLM) -> None:
    sampling = ours._sampling({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": ["\n"]})
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 256)
    assert sampling.stop == ("\n", "<|im_end|>")
    assert ours._sampling({"do_sample": True}).temperature == 1 and ours._sampling({}).is_greedy
    with pytest.raises(RequestError, match="num_beams"):
        ours._sampling({"num_beams": 4})


def test_chats_as_transformers_writes_them(ours: SlipstreamLM, theirs: HFLM) -> None:
    chat = [{"role": "user", "content": "The capital of France?"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    chat.append({"role": "assistant", "content": "It is"})
    text = ours.apply_chat_template(chat, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(chat, add_generation_prompt=False) and text.endswith("It is")
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_a_continuation_without_a_token_of_its_own(ours: SlipstreamLM) -> None:
    assert len(ours.tok_encode("The ca")) >= len(ours.tok_encode("The capital"))
    with pytest.raises(RequestError, match="and 'pital', so that it has no logprob of its own"):
        ours.loglikelihood(requests("loglikelihood", [("The ca", "pital")]))


def test_what_cannot_be_opened_is_named(task_folder: Path, tmp_path: Path) -> None:
    whole = (task_folder / "capitals.yaml").read_text()
    for name, change in {
        "missing": (".jsonl", ".gone"),
        "unsafe": ("metadata:", "unsafe_code: true\nmetadata:"),
        "unfit": ("{{country}}", "{{county}}"),
    }.items():
        (tmp_path / f"{name}.yaml").write_text(whole.replace("task: capitals", f"task: {name}").replace(*change))
    with pytest.raises(UsageError, match=r"--tasks missing cannot be loaded .*FileNotFound"):
        open_tasks(["missing"], tmp_path)
    with pytest.raises(UsageError, match=r"--tasks unfit cannot be loaded .*'county' is undefined"):
        open_tasks(["unfit"], tmp_path)
    with pytest.raises(UsageError, match="--tasks unsafe is marked UNSAFE_CODE"):
        open_tasks(["unsafe"], tmp_path)
    with pytest.raises(UsageError, match=r"capitals\.yaml is not a folder"):
        open_tasks(["capitals"], task_folder / "capitals.yaml")
    with pytest.raises(UsageError, match=r"--tasks geography,capitals name a task twice .*Duplicate task 'capitals'"):
        open_tasks(["geography", "capitals"], task_folder)


def test_a_group_has_a_row_of_its_own(ours: SlipstreamLM, task_folder: Path) -> None:
    group = open_tasks(["geography"], task_folder)
    found = evaluate_tasks(ours.llm, group, num_fewshot=None, limit=4, apply_chat_template=False)
    shown = metrics_of(found)
    assert shown["geography", "acc"] == shown["capitals", "acc"]
