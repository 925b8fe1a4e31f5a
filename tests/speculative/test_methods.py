"""Every method of slipstream/speculative: texts are those of plain decoding, in any company.

The runner walks the folder, and a method that is added needs a row in METHODS. What a drafter can do at all is tried by
test_lossless.py.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from slipstream import LLM, SamplingParams
from slipstream.api.outputs import RequestOutput
from slipstream.checkpoint.random import write_random_model
from slipstream.kernels.sampling import SlotTable
from slipstream.models import gemma3_text, llama, qwen3
from slipstream.runtime.draft_control import DraftControl
from slipstream.runtime.speculation import methods
from slipstream.runtime.worker.drafts import Drafts
from slipstream.runtime.worker.ending import Ending, EndingPlan
from slipstream.runtime.worker.inputs import fill_inputs, sizes_of
from slipstream.runtime.worker.recorded import RecordedSteps, StepOutputs
from slipstream.runtime.worker.worker import Begun, Worker
from slipstream.schema.build import DraftShape
from slipstream.schema.step import StepPlan
from slipstream.speculative.draft_model import drafter as draft_model
from slipstream.speculative.drafter import DraftTensors
from tests.speculative.heads import write_eagle, write_eagle3, write_medusa, write_redrafter
from tests.speculative.likeness import write_likeness
from tests.speculative.test_lossless import LIMITS, REQUESTS, assert_same, prompts, run, texts_of

ARCHITECTURES = {"llama": llama.TINY, "gemma3_text": gemma3_text.TINY, "qwen3": qwen3.TINY}

# How each drafts for a model in this folder; whatever it needs besides goes into another one. A row's first word is its
# method.
METHODS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "ngram": lambda model, folder: {"method": "ngram", "max_draft_len": 6, "min_ngram": 1},
    "draft_model": lambda model, folder: {
        "method": "draft_model", "model": str(write_likeness(model, folder)), "max_draft_len": 4
    },
    "eagle": lambda model, folder: {
        "method": "eagle", "model": str(write_eagle(model, folder)), "choices": "[[0], [1], [0, 0], [1, 0], [0, 0, 0]]",
    },
    "eagle 3, grown": lambda model, folder: {"method": "eagle", "model": str(write_eagle3(model, folder))},
    "lookahead": lambda model, folder: {"method": "lookahead", "window": 2, "ngram": 3, "guesses": 1},
    "medusa": lambda model, folder: {"method": "medusa", "model": str(write_medusa(model, folder))},
    "redrafter": lambda model, folder: {"method": "redrafter", "model": str(write_redrafter(model, folder))},
}  # fmt: skip
FEW = [0, 2, 5, 7]  # of REQUESTS, alone
# Whose steps may be launched before it is known where they begin.
LATE = {"draft_model", "eagle", "medusa", "redrafter"}


def test_no_method_is_left_out() -> None:
    assert {row.partition(" ")[0] for row in METHODS} == set(methods())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[RequestOutput], list[RequestOutput]]:
    """A random model, what it answers without drafts, and its draws of many seeds."""
    model = write_random_model(tmp_path_factory.mktemp(request.param), ARCHITECTURES[request.param])
    with LLM(model, **LIMITS) as llm:
        return model, run(model, REQUESTS)[0], draws(llm)


def draws(llm: LLM) -> list[RequestOutput]:
    """At temperature 1; the first step that verifies drafts is that of the second token."""
    asked = SamplingParams(max_tokens=5, n=64, temperature=1.0, seed=7)
    return llm.generate([prompts(llm.manifest.vocab_size)[6]], [asked])


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_those_of_plain_decoding(
    method: str, plain: tuple[Path, list[RequestOutput], list[RequestOutput]], tmp_path: Path
) -> None:
    model, expected, expected_draws = plain
    speculative = METHODS[method](model, tmp_path / "draft") | {"adaptive": False}
    with LLM(model, **LIMITS, speculative=speculative) as llm:
        asked = [SamplingParams(**{"max_tokens": 40, **each}) for each in REQUESTS]
        assert_same(llm.generate(prompts(llm.manifest.vocab_size)[: len(asked)], asked), expected)
        in_company = llm.stats
        assert_same(draws(llm), expected_draws)
        assert llm.stats.num_blocks_used == 0
        assert llm.stats.num_draft_tokens > in_company.num_draft_tokens
    assert 0 < sum(in_company.num_accepted_tokens) < in_company.num_draft_tokens

    with LLM(model, **LIMITS | {"max_batch_size": 1}, speculative=speculative) as llm:
        found = [llm.generate(prompts(llm.manifest.vocab_size)[index], asked[index]) for index in FEW]
    assert_same(found, [expected[index] for index in FEW])


@pytest.fixture
def num_late(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Steps by whether they are late, of engines that launch ahead as on a GPU."""
    counted, begin = Counter[bool](), Worker.begin

    def count(self: Worker, plan: StepPlan) -> Begun:
        counted[any(step.late_by for step in plan.sequences)] += 1
        return begin(self, plan)

    monkeypatch.setattr(Worker, "computes_by_itself", True)
    monkeypatch.setattr(Worker, "begin", count)
    return counted


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_the_same_where_the_next_step_is_launched_already(
    method: str, plain: tuple[Path, list[RequestOutput], list[RequestOutput]], tmp_path: Path, num_late: Counter[bool]
) -> None:
    """Drafts that the device makes and verifies leave nothing for the host to know before the next step begins."""
    model, expected, expected_draws = plain
    for is_adaptive in (False, True):
        speculative = METHODS[method](model, tmp_path / f"draft {is_adaptive}") | {"adaptive": is_adaptive}
        with LLM(model, **LIMITS, speculative=speculative) as llm:
            asked = [SamplingParams(**{"max_tokens": 40, **each}) for each in REQUESTS]
            assert_same(llm.generate(prompts(llm.manifest.vocab_size)[: len(asked)], asked), expected)
            assert_same(draws(llm), expected_draws)
            for index in FEW:
                assert_same([llm.generate(prompts(llm.manifest.vocab_size)[index], asked[index])], [expected[index]])
            stats = llm.stats
        assert (stats.num_blocks_used, stats.num_running) == (0, 0)
        assert 0 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens
    assert (num_late[True] > 10) == (method.partition(" ")[0] in LATE)


@pytest.mark.parametrize("method", [row for row in METHODS if row.partition(" ")[0] in LATE])
def test_late_steps_may_have_others_that_are_edited(
    method: str, adapting: tuple[Path, list[RequestOutput]], tmp_path: Path, num_late: Counter[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two long texts, and beside them short ones, of which every other one is chosen by the host."""
    model, _ = adapting
    both, run_and_draw = Counter[bool](), Worker._run_and_draw

    def count(self: Worker, plan: StepPlan, counts: Any, steps: Any) -> Any:
        is_late = any(step.late_by for step in plan.sequences)
        both[is_late and any(self._sampler.is_edited(step.slot) for step in steps)] += 1
        return run_and_draw(self, plan, counts, steps)

    monkeypatch.setattr(Worker, "_run_and_draw", count)

    def answers(speculative: dict[str, Any] | None) -> list[list[int]]:
        with LLM(model, **LIMITS | {"max_batch_size": 3}, speculative=speculative) as llm:
            asked = prompts(llm.manifest.vocab_size)
            short = [{"max_tokens": 6}, {"max_tokens": 2, "logit_bias": {3: 1.0}}] * 14
            wishes = [SamplingParams(temperature=0, **each) for each in [{"max_tokens": 120}] * 2 + short]
            return texts_of(llm.generate([asked[index % len(asked)] for index in range(len(wishes))], wishes))

    expected = answers(None)
    assert answers(METHODS[method](model, tmp_path / "draft") | {"adaptive": False}) == expected
    assert both[True] > 2


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_the_same_whatever_number_of_drafts_is_asked_for(
    method: str, adapting: tuple[Path, list[RequestOutput]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence has another number in each step, and often none; then its drafter has missed what was said."""
    model, expected = adapting
    rng, asked_for = random.Random(0), set[int]()

    def ask(self: DraftControl, slots: Sequence[int]) -> list[int]:
        most = self.max_draft_len
        lengths = [rng.choice((0, 0, 1, rng.randint(0, most), most)) for _ in slots]
        if self.shape is DraftShape.WHOLE:
            lengths = [most if length else 0 for length in lengths]
        asked_for.update(lengths)
        return lengths

    monkeypatch.setattr(DraftControl, "ask", ask)
    found, stats = run(model, REQUESTS, speculative=METHODS[method](model, tmp_path / "draft"))
    assert_same(found, expected)
    assert 0 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens
    assert min(asked_for) == 0 and len(asked_for) > (1 if method == "lookahead" else 3)


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RequestOutput]]:
    model = write_random_model(tmp_path_factory.mktemp("adapting"), llama.TINY)
    return model, run(model, REQUESTS)[0]


class Replayed(RecordedSteps):
    """Steps of the sizes that a GPU records, filled in part as there, with nothing looked at on the way."""

    def record_short(self, *_: Any) -> None:
        pass

    def run(
        self, plan: StepPlan, logit_counts: Sequence[int], is_chosen: Sequence[bool], ending: EndingPlan | None = None
    ) -> StepOutputs | None:
        kind = self._kind(sizes_of(plan, logit_counts, self._tables), ending)
        assert kind is not None
        numbers = torch.full((kind.sizes.num_numbers,), 99)
        fill_inputs(plan, logit_counts, is_chosen, self._tables, kind.sizes, numbers, self._known)
        outputs, num_rows = self._run(kind.sizes.views(numbers), ending), sum(logit_counts)
        return outputs._replace(logits=outputs.logits[:num_rows], token_ids=outputs.token_ids[:num_rows])


class Unseen(TorchDispatchMode):
    """Whoever asks what a tensor holds fails, as he would in a recording; and who brings one from the host."""

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        assert call not in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        assert call not in (aten.lift_fresh.default, aten.repeat_interleave.Tensor, aten.bincount.default)
        if call in (aten.index.Tensor, aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return call(*args, **(kwargs or {}))


def looking(call: Callable[..., Any]) -> Callable[..., Any]:
    """What has kernels of its own on a GPU: a CPU's may look."""

    def looked(*arguments: Any) -> Any:
        with _disable_current_modes():
            return call(*arguments)

    return looked


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_as_a_gpu_replays_them(
    method: str, adapting: tuple[Path, list[RequestOutput]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    num_late: Counter[bool],
) -> None:  # fmt: skip
    """Of few sizes, each with an ending that drafts as much as can be for all that there is room for; and late."""
    allocate, run_padded, end, endings = Worker.allocate_kv, Replayed.run, Ending.run, list[EndingPlan | None]()
    kind_of, kinds, verifying = Replayed._kind, list[Any](), set[Any]()

    def allocate_and_record(self: Worker, num_blocks: int) -> None:
        allocate(self, num_blocks)
        self._drafts._may_look = self._ending._may_look = False
        self._recorded = Replayed(
            self._run, self._tables, self._max_batch_size, self._most_rows, self._device, self._ending.known
        )

    def note(self: Replayed, plan: Any, counts: Any, chosen: Any, ending: EndingPlan | None = None) -> Any:
        endings.append(ending)
        outputs = run_padded(self, plan, counts, chosen, ending)
        if ending is not None and any(step.num_drafts for step in plan.sequences):
            verifying.add(kinds[-1])
        return outputs

    def note_kind(self: Replayed, *arguments: Any) -> Any:
        kinds.append(kind_of(self, *arguments))
        return kinds[-1]

    def end_unseen(self: Ending, *inputs: Any) -> Tensor:
        with Unseen():
            return end(self, *inputs)

    monkeypatch.setattr(draft_model.Drafter, "_compute", looking(draft_model.Drafter._compute))
    monkeypatch.setattr(SlotTable, "choose", looking(SlotTable.choose))
    monkeypatch.setattr(Worker, "allocate_kv", allocate_and_record)
    monkeypatch.setattr(Ending, "run", end_unseen)
    monkeypatch.setattr(Replayed, "run", note)
    monkeypatch.setattr(Replayed, "_kind", note_kind)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, expected = adapting
    speculative = METHODS[method](model, tmp_path / "draft") | {"adaptive": False}
    found, stats = run(model, REQUESTS, speculative=speculative)
    assert_same(found, expected)
    assert 0 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens
    assert None in endings  # of steps in which the host edits
    endings.clear()
    found, _ = run(model, REQUESTS[:5], speculative=speculative)
    assert_same(found, expected[:5])
    with LLM(model, **LIMITS, speculative=speculative) as llm:
        for index in FEW:
            asked = SamplingParams(**{"max_tokens": 40, **REQUESTS[index]})
            verifying.clear()
            assert_same([llm.generate(prompts(llm.manifest.vocab_size)[index], asked)], [expected[index]])
            assert len(verifying) <= 1  # to its end: one recording
    assert sum(ending is not None and ending.num_nodes > 1 for ending in endings) > 5
    assert (num_late[True] > 5) == (method.partition(" ")[0] in LATE)


RANKS = {"tp_size": 2, "pp_size": 2}


@pytest.mark.parametrize("method", METHODS)
def test_ranks_draft_and_say_what_one_does(
    method: str, adapting: tuple[Path, list[RequestOutput]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of parts are rounded in another order, so that a draft may be another at a near tie; texts are the same."""
    model, expected = adapting
    speculative = METHODS[method](model, tmp_path / "draft") | {"adaptive": False}
    drafts, keep = list[tuple[int, ...]](), Drafts.keep

    def look(self: Drafts, slots_S: Tensor, made: DraftTensors) -> None:
        drafts.extend(map(tuple, made.token_ids.tolist()))
        keep(self, slots_S, made)

    monkeypatch.setattr(Drafts, "keep", look)
    assert_same(run(model, REQUESTS[:4], speculative=speculative)[0], expected[:4])
    of_one = Counter(drafts)
    drafts.clear()
    found, stats = run(model, REQUESTS[:4], speculative=speculative, show_progress=False, **RANKS)
    assert_same(found, expected[:4])
    assert stats.num_draft_tokens > 0
    assert (of_one & Counter(drafts)).total() > 0.9 * len(drafts)


NUM_SAMPLES = 64, 320  # texts, and tokens of each


@pytest.fixture(scope="module")
def bigrams(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A model whose layers add nothing, so that each token depends on the one before alone; its logits after each."""
    model = tmp_path_factory.mktemp("bigrams")
    write_random_model(model, llama.TINY | {"vocab_size": 16, "max_position_embeddings": 400})
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    x_VH = weights["model.embed_tokens.weight"].double()
    x_VH = x_VH / (x_VH.square().mean(1, keepdim=True) + llama.TINY["rms_norm_eps"]).sqrt()
    return model, (x_VH * weights["model.norm.weight"].double()) @ weights["lm_head.weight"].double().T


@pytest.mark.parametrize("method", METHODS)
def test_pairs_of_tokens_are_as_likely_as_the_model_says(
    method: str, bigrams: tuple[Path, Tensor], tmp_path: Path
) -> None:
    """By chi-square over 20,480 pairs (Anderson and Goodman, 1957), which a temperature of 1.1 would not pass."""
    model, logits_VV = bigrams
    num_texts, length = NUM_SAMPLES
    speculative = METHODS[method](model, tmp_path / "draft") | {"adaptive": False}
    if method != "lookahead":  # whose window says how many
        speculative["max_draft_len"] = 3
    limits = {"max_batch_size": num_texts, "max_num_tokens": 512, "kv_cache_max_tokens": 2 * num_texts * length}
    with LLM(model, **limits, speculative=speculative) as llm:
        asked = [SamplingParams(max_tokens=length, seed=seed, temperature=1.0) for seed in range(num_texts)]
        texts = texts_of(llm.generate([[seed % 16] for seed in range(num_texts)], asked))
        assert sum(llm.stats.num_accepted_tokens) > NUM_SAMPLES[0] * NUM_SAMPLES[1] // 50
    counts_VV = np.zeros((16, 16))
    for text in texts:
        np.add.at(counts_VV, (text[:-1], text[1:]), 1)
    assert counts_VV.sum() == num_texts * length
    assert likelihood(counts_VV, logits_VV.softmax(1)) > 1e-3
    assert likelihood(counts_VV, (logits_VV / 1.1).softmax(1)) < 1e-6


def likelihood(counts_VV: np.ndarray[Any, Any], probs_VV: Tensor) -> float:
    """Of counts as unlikely as these, or more so."""
    expected_VV = counts_VV.sum(1, keepdims=True) * probs_VV.numpy()
    is_enough_VV = expected_VV > 5
    statistic = ((counts_VV - expected_VV) ** 2 / expected_VV)[is_enough_VV].sum()
    return float(stats.chi2.sf(statistic, is_enough_VV.sum() - len(counts_VV)))
