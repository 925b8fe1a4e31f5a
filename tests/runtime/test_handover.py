"""A prompt computed by one engine and gone on with by another: the tokens of one engine, whatever lies between."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models import gemma3_text, llama
from slipstream.schema.request import GenerateRequest, TokenEvent
from tests.api.test_kv_cache import write_calibrated
from tests.speculative.heads import write_eagle

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
DRAWN = SamplingParams(max_tokens=12, temperature=1, top_p=0.9, seed=3, ignore_eos=True, logprobs=0)
SIZES: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 64, "show_progress": False}


def ask(llm: LLM, request: GenerateRequest) -> list[TokenEvent]:
    """All that comes of it."""
    events, has_ended = list[TokenEvent](), threading.Event()

    def take(event: TokenEvent) -> None:
        events.append(event)
        if event.finish_reason is not None:
            has_ended.set()

    llm.loop.submit(request, take)
    assert has_ended.wait(60)
    return events


def token_ids(events: Sequence[TokenEvent]) -> list[int]:
    assert not events[-1].error, events[-1].error
    return [token_id for event in events for token_id in event.token_ids]


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * i * i + 3 * i + seed) % 128 for i in range(length))


class Pair:
    """A prefill engine and a decode engine of one model."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        self.prefill, self.decode = (LLM(model, **SIZES | options) for _ in range(2))
        self._folder, self._num_asked = folder, 0

    def request(self, prompt: tuple[int, ...], sampling: SamplingParams) -> GenerateRequest:
        self._num_asked += 1
        return self.decode.request_maker.request(f"r{self._num_asked}", prompt, sampling)

    def prefilled(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the KV of its prompt."""
        path = self._folder / request.request_id
        path.touch()
        first = self.prefill.request_maker.request("p", request.prompt_token_ids[:-1], SamplingParams(max_tokens=1))
        [event] = ask(self.prefill, replace(first, kv_to=str(path)))
        assert event.error is None
        return replace(request, kv_from=str(path))

    def num_computed(self) -> int:
        return self.decode.stats.prompt_tokens_computed

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


MODELS = {"llama": llama.TINY, "gemma3_text": gemma3_text.TINY}  # the second has windows
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"dtype": "float32"}),
    "windows": ("gemma3_text", {"dtype": "float32"}),
    "sinks": ("llama", {"dtype": "float32", "max_attention_window_size": [24], "sink_token_length": 3}),
    "bfloat16": ("llama", {"dtype": "float32", "kv_cache_dtype": "bfloat16"}),
    "fp8": ("llama", {"dtype": "float32", "kv_cache_dtype": "fp8"}),
    "int8": ("calibrated", {"dtype": "float32"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    written = {name: write_random_model(folder / name, options) for name, options in MODELS.items()}
    return written | {"calibrated": write_calibrated(folder / "calibrated", "int8")}


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    model, options = KINDS[request.param]
    pair = Pair(models[model], tmp_path_factory.mktemp("kv"), **options)
    yield pair
    pair.close()


@pytest.fixture
def plain(models: dict[str, Path], tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(models["llama"], tmp_path, dtype="float32")
    yield pair
    pair.close()


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 32, 33, 47, 48, 49, 120])
def test_tokens_are_those_of_one_engine(pair: Pair, length: int) -> None:
    """Lengths around a block's 16 tokens, one that takes several steps; the salt keeps each from the one before."""
    for sampling in (GREEDY, DRAWN):
        request = pair.request(prompt_of(length), sampling)
        expected = ask(pair.prefill, replace(request, cache_salt=f"alone {length} {sampling.seed}"))
        request = replace(request, cache_salt=f"{length} {sampling.seed}")
        before = pair.num_computed()
        found = ask(pair.decode, pair.prefilled(request))
        assert token_ids(found) == token_ids(expected)
        assert pair.num_computed() - before == 1  # the last token, from which the first one is drawn
        assert not list(pair._folder.iterdir())


def test_each_finds_the_prefixes_that_it_has(plain: Pair) -> None:
    """What the decode engine has already is not loaded again; what it has generated itself is in no file."""
    first = plain.request(prompt_of(50), GREEDY)
    answer = token_ids(ask(plain.decode, plain.prefilled(first)))
    longer = plain.request((*prompt_of(50), *answer, *prompt_of(30, seed=5)), GREEDY)
    expected = token_ids(ask(plain.prefill, replace(longer, cache_salt="alone")))
    before = plain.prefill.stats.prompt_tokens_cached
    ready = plain.prefilled(longer)
    assert plain.prefill.stats.prompt_tokens_cached - before == 49
    events = ask(plain.decode, ready)
    assert token_ids(events) == expected
    assert events[0].num_cached_tokens == 48  # whole blocks of the first prompt: the file has the rest
    assert token_ids(ask(plain.decode, replace(longer, request_id="again"))) == expected


def test_without_a_file_that_fits_the_prompt_is_computed(plain: Pair, tmp_path: Path) -> None:
    """A file may be gone, empty, cut off, of another prompt or cache, or point beyond its blocks: that costs the time
    to compute the prompt, and no more."""
    expected = token_ids(ask(plain.prefill, plain.request(prompt_of(40), GREEDY)))
    ready = [plain.prefilled(plain.request(prompt_of(length), GREEDY)) for length in (40, 39)]
    good, shorter = (Path(request.kv_from or "").read_bytes() for request in ready)
    renamed = good.replace(b'"kv.0"', b'"kv.x"')
    data = 8 + int.from_bytes(good[:8], "little")  # where the places are first
    beyond = good[:data] + (99).to_bytes(8, "little") + good[data + 8 :]
    for number, content in enumerate([None, b"", good[:-100], shorter, renamed, beyond]):
        path = tmp_path / str(number)
        if content is not None:
            path.write_bytes(content)
        request = replace(plain.request(prompt_of(40), GREEDY), kv_from=str(path), cache_salt=str(number))
        before = plain.num_computed()
        assert token_ids(ask(plain.decode, request)) == expected
        assert plain.num_computed() - before == 40
        assert not path.exists()


def test_a_prompt_that_nobody_waits_for_leaves_no_file(plain: Pair, tmp_path: Path) -> None:
    request = replace(plain.request(prompt_of(40), GREEDY), max_tokens=1)
    for path, why in ((tmp_path / "gone", "No such file"), (Path("/dev/full"), "No space left")):
        [event] = ask(plain.prefill, replace(request, kv_to=str(path)))
        assert event.error is not None and f"could not be written to {path}: {why}" in event.error
    assert not list(tmp_path.iterdir())


def test_a_drafter_with_a_layer_of_its_own_goes_on_too(models: dict[str, Path], tmp_path: Path) -> None:
    """Its KV comes along; of the last token found it depends on the next one, so that two are computed."""
    eagle = {"method": "eagle", "model": str(write_eagle(models["llama"], tmp_path / "eagle")), "max_draft_len": 3}
    pair = Pair(models["llama"], tmp_path, dtype="float32", speculative=eagle)
    request = pair.request(prompt_of(50), GREEDY)
    found = ask(pair.decode, pair.prefilled(request))
    assert pair.num_computed() == 2
    theirs, ours = (drafter_kv(llm)[:, 1:4] for llm in (pair.prefill, pair.decode))  # three full blocks, the first used
    assert torch.equal(theirs, ours) and theirs.count_nonzero() == theirs.numel()
    assert token_ids(found) == token_ids(ask(pair.prefill, request))
    pair.close()


def drafter_kv(llm: LLM) -> Tensor:
    assert llm.loop._engine is not None
    [kv_PNBKD] = llm.loop._engine._worker._drafter_kv
    return kv_PNBKD
