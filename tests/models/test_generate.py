"""Every architecture answers as transformers does: greedy tokens of requests in flight together, with blocks reused,
and the vectors that texts become.

The outputs are longer than the windows of the models that have one, so blocks are given up on the way.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks
from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models import known_models, model_file
from tests.oracle import pooled

NUM_NEW = 24
SHARED = list(range(2, 36))  # longer than two blocks: the third prompt finds them kept
PROMPTS = [[*SHARED, 7, 8], [90, 3, 41], [*SHARED, 101]]
MAX_SEQ_LEN = 64


class Opened(NamedTuple):
    folder: Path
    llm: LLM


@pytest.fixture(scope="module", params=known_models())
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_random_model(folder / "model", model_file(request.param).TINY, seed=11)
    with LLM(model, dtype="float32", max_seq_len=MAX_SEQ_LEN, max_num_tokens=16, max_batch_size=2) as llm:
        yield Opened(model, llm)


def test_greedy_tokens_equal_transformers(opened: Opened) -> None:
    outputs = opened.llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True))
    reference = reference_of(AutoModelForCausalLM, opened.folder)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [greedy(reference, each) for each in PROMPTS]
    assert outputs[2].num_cached_tokens > 0


@pytest.mark.filterwarnings("ignore:.*eos_token_id")  # a default of models with more words
def test_what_transformers_saves_again_is_the_same_model(opened: Opened, tmp_path: Path) -> None:
    """Its config.json of today: other names, all defaults written out."""
    reference_of(AutoModelForCausalLM, opened.folder).save_pretrained(tmp_path)
    greedily = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    expected = opened.llm.generate(PROMPTS, greedily)
    with LLM(tmp_path, dtype="float32", max_seq_len=MAX_SEQ_LEN) as llm:
        outputs = llm.generate(PROMPTS, greedily)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


def test_vectors_equal_transformers(opened: Opened) -> None:
    """Texts in several pieces beside each other, up to as long as a sequence may be; for `last` some is KV found."""
    texts = [*PROMPTS, [*SHARED, *range(2, 2 + MAX_SEQ_LEN - len(SHARED))]]
    if opened.llm.manifest.model_type == "baichuan":  # its reference has no body of its own
        states = [normed_states(reference_of(AutoModelForCausalLM, opened.folder), text) for text in texts]
    else:
        states = [hidden_states(reference_of(AutoModel, opened.folder), text) for text in texts]
    for pooling in ("mean", "last"):
        vectors = opened.llm.embed(texts, pooling=pooling)
        for vector, states_TH in zip(vectors, states, strict=True):
            expected = pooled(states_TH, pooling)
            torch.testing.assert_close(torch.from_numpy(vector.embedding), expected, atol=1e-5, rtol=0)


def reference_of(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def greedy(reference: nn.Module, prompt: list[int]) -> list[int]:
    """The whole sequence again for each token: nothing is cached, so nothing can be cached wrongly."""
    token_ids = list(prompt)
    for _ in range(NUM_NEW):
        token_ids.append(int(reference(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt) :]


@torch.no_grad()
def hidden_states(reference: nn.Module, text: list[int]) -> Tensor:
    states_TH: Tensor = reference(torch.tensor([text])).last_hidden_state[0]
    return states_TH


@torch.no_grad()
def normed_states(reference: Any, text: list[int]) -> Tensor:
    made: list[Tensor] = []
    hook = reference.model.norm.register_forward_hook(lambda module, given, result: made.append(result))
    reference(torch.tensor([text]))
    hook.remove()
    return made[0]
