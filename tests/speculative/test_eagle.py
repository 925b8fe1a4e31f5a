"""EAGLE's drafts against its equations, a head that is always right, and which heads are refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slipstream import LLM, SamplingParams
from slipstream.api.building import BuildOptions, engine_path
from slipstream.checkpoint import resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.engine.shared import products_in_bytes
from slipstream.errors import ModelError, SlipstreamError, UsageError
from slipstream.models import llama, mistral
from slipstream.runtime.worker.drafts import Drafts
from slipstream.runtime.worker.ending import Ended, Ending
from slipstream.speculative.drafter import Draft, DraftTensors, Ends
from slipstream.speculative.eagle import drafter as eagle
from slipstream.speculative.eagle.trees import Growing, width_for
from tests.speculative.heads import write_eagle, write_eagle3
from tests.speculative.naive_eagle import NaiveEagle
from tests.speculative.test_lossless import LIMITS

CHOICES = [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 1], [1, 0, 2]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), llama.TINY)


class Seen(NamedTuple):
    token_ids: tuple[int, ...]
    draft: Draft


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Every draft, with the text that it goes on from."""
    texts, made, found = dict[int, list[int]](), dict[int, Draft](), list[Seen]()
    add, draft, end = Drafts.add, eagle.Drafter.draft, Ending.run

    def enter(self: Any, slot: int, request: Any, output_token_ids: tuple[int, ...]) -> None:
        texts[slot] = [*request.prompt_token_ids, *output_token_ids]
        add(self, slot, request, output_token_ids)

    def look(self: Any, ends: Ends, most: int) -> DraftTensors:
        drafts = draft(self, ends, most)
        made.update(zip(ends.slots.tolist(), drafts.lists(), strict=True))
        return drafts

    def look_back(self: Any, ending: Any, inputs: Any, *rest: Any) -> Tensor:
        made.clear()
        ended_SX = end(self, ending, inputs, *rest)
        counts_S, token_ids_SM, *_ = Ended.unpacked(ended_SX).accepted
        for slot, count, token_ids in zip(inputs["trees.slots"].tolist(), counts_S, token_ids_SM.tolist(), strict=True):
            if slot >= 0:
                texts[slot] += token_ids[:count]
                found.extend([Seen(tuple(texts[slot]), made[slot])] if slot in made else [])
        return ended_SX

    monkeypatch.setattr(Drafts, "add", enter)
    monkeypatch.setattr(eagle.Drafter, "draft", look)
    monkeypatch.setattr(Ending, "run", look_back)
    return found


class Oracle:
    """The model by transformers, its head by the equations."""

    def __init__(self, model: Path, head: Path, layers: Sequence[int] = (-1,)) -> None:
        self.model, self.layers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval(), layers
        embed, lm_head = (part().weight for part in (self.model.get_input_embeddings, self.model.get_output_embeddings))
        self.eagle = NaiveEagle(head, embed, lm_head)

    @torch.inference_mode()
    def features(self, token_ids: Sequence[int]) -> Tensor:
        states = self.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        return torch.cat([states[layer][0] for layer in self.layers], 1)

    @torch.inference_mode()
    def check_written(self, each: Seen, choices: Sequence[Sequence[int]]) -> None:
        """That a tree of these choices has the tokens that the equations say."""
        features_TF = self.features(each.token_ids)[:-1]
        found = dict(zip(map(tuple, choices), each.draft.token_ids, strict=True))
        for above in {choice[:-1] for choice in found}:
            guesses = [found[above[:depth]] for depth in range(1, len(above) + 1)]
            ranked = self.eagle.log_probs(features_TF, list(each.token_ids), guesses).argsort(descending=True)
            for choice, token_id in found.items():
                if choice[:-1] == above:
                    assert token_id == self.eagle.token_id(int(ranked[choice[-1]])), (len(each.token_ids), choice)

    @torch.inference_mode()
    def grown(self, token_ids: Sequence[int], depth: int, width: int) -> list[tuple[int, ...]]:
        """The ways down a tree of EAGLE-2, the likeliest first."""
        features_TF = self.features(token_ids)[:-1]
        found, going_on = list[tuple[float, tuple[int, ...]]](), [(0.0, tuple[int, ...]())]
        for _ in range(depth):
            children = []
            for score, way in going_on:
                best = self.eagle.log_probs(features_TF, list(token_ids), list(way)).topk(width)
                children += [
                    (score + float(value), (*way, self.eagle.token_id(int(drafted))))
                    for value, drafted in zip(*best, strict=True)
                ]
            found += children
            going_on = sorted(children, reverse=True)[:width]
        return [way for _, way in sorted(found, reverse=True)]


def written(head: Path, folder: Path, choices: Sequence[Sequence[int]] = CHOICES) -> dict[str, Any]:
    file = folder / "choices.json"
    file.write_text(json.dumps(choices))
    return {"method": "eagle", "model": str(head), "choices": str(file), "adaptive": False}


def prompts(count: int, length: int) -> list[list[int]]:
    """Which begin alike, up to a place inside a block, and then differ."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(128, (count, length), generator=generator)
    drawn[:, : length // 2] = drawn[0, : length // 2]
    return drawn.tolist()


IN_CHUNKS = {"max_num_tokens": 16, "max_batch_size": 3}
PREEMPTED = {"kv_cache_max_tokens": 160, "capacity_scheduler_policy": "max_utilization"}


@pytest.mark.parametrize(
    ("options", "write", "config", "layers"),
    [
        ({}, write_eagle, {}, [-1]),
        (IN_CHUNKS, write_eagle, {}, [-1]),
        (PREEMPTED, write_eagle, {"rope_theta": 500.0, "num_key_value_heads": 1, "rms_norm_eps": 0.01}, [-1]),
        (IN_CHUNKS, write_eagle3, {"eagle_aux_hidden_state_layer_ids": [2, 1, 0]}, [2, 1, 0]),
        ({}, write_eagle3, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0, 1]}}, [0, 1, 2]),
        ({}, write_eagle3, {"norm_before_residual": True, "head_dim": 8}, [2, 1, 0]),
    ],
    ids=["eagle", "chunks", "preempted", "third", "inside", "normed"],
)
def test_drafts_are_what_the_equations_say(
    options: dict[str, Any], write: Callable[..., Path], config: dict[str, Any], layers: list[int], model: Path,
    tmp_path: Path, seen: list[Seen],
) -> None:  # fmt: skip
    """However a prompt came into the cache: in chunks, found there, or again after a preemption."""
    head = write(model, tmp_path / "head", **config)
    asked = SamplingParams(max_tokens=12, temperature=0)
    with LLM(model, **LIMITS | options, speculative=written(head, tmp_path)) as llm:
        given = prompts(5, 38)
        llm.generate(given, asked)
        llm.generate(given[:2], asked)
        assert llm.stats.prompt_tokens_cached > 2 * 19
        if "capacity_scheduler_policy" in options:
            assert llm.stats.num_preemptions > 0
    oracle = Oracle(model, head, layers)
    assert len(seen) > 50
    for each in seen[::2]:
        oracle.check_written(each, CHOICES)


@pytest.mark.parametrize(
    ("write", "layers", "tree"),
    [
        (write_eagle, [-1], {"depth": 3, "width": 4, "max_draft_len": 14}),
        (write_eagle3, [2, 1, 0], {"depth": 4, "width": 2}),
        (write_eagle, [-1], {"depth": 1, "width": 5, "max_draft_len": 3}),
    ],
    ids=["deep", "of three layers", "wide"],
)
def test_trees_grow_where_the_equations_are_surest(
    write: Callable[..., Path], layers: list[int], tree: dict[str, int], model: Path, tmp_path: Path, seen: list[Seen]
) -> None:
    head = write(model, tmp_path / "head")
    with LLM(model, **LIMITS, speculative={"method": "eagle", "model": str(head), "adaptive": False, **tree}) as llm:
        llm.generate(prompts(3, 21), SamplingParams(max_tokens=8, temperature=0))
    oracle = Oracle(model, head, layers)
    for each in seen[::3]:
        expected = oracle.grown(each.token_ids, tree["depth"], tree["width"])
        ways = [()]
        for token_id, parent in zip(each.draft.token_ids, each.draft.parents or (), strict=True):
            ways.append((*ways[parent], token_id))
        assert ways[1:] == expected[: tree.get("max_draft_len", 24)]


@pytest.mark.parametrize("most", range(1, 25))
def test_few_drafts_are_of_a_narrow_tree(most: int) -> None:
    whole = Growing(8, 5, 24)
    trees = whole.narrowed(most)
    assert most <= trees.num_drafts <= most + 2 and len(trees.widths) == min(5, most)
    assert most <= trees.num_nodes * trees.num_ranks and trees.num_nodes <= whole.num_nodes
    assert (trees.num_nodes == most) == (most <= 3)  # one way down, and no node that is of no use


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 2, 4, 6, 24])
def test_a_shallow_tree_is_as_wide_as_its_drafts_need(depth: int, most: int) -> None:
    assert Growing(width_for(most, depth), depth, most).num_drafts == most


@pytest.mark.parametrize(("quantization", "in_bytes"), [("int8", True), (None, False)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_its_matrices_are_multiplied_in_bytes_where_the_models_head_is(
    quantization: str | None, in_bytes: bool, has_bias: bool, model: Path
) -> None:
    cpu, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    options = BuildOptions(quantization=quantization)
    engine = open_engine(engine_path(resolve(str(model)), options, cpu, show_progress=False))
    to_product = products_in_bytes(engine, cpu)
    assert (to_product is not None) == in_bytes
    if to_product is None:
        return
    weight_NK, bias_N = torch.randn(96, 64, generator=rng), torch.randn(96, generator=rng)
    x_2SK = torch.randn(2, 5, 64, generator=rng)
    expected = functional.linear(x_2SK, weight_NK, bias_N if has_bias else None)
    found = to_product(weight_NK, bias_N if has_bias else None)(x_2SK)
    assert found.shape == expected.shape
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()


def test_a_head_that_is_the_models_only_layer_is_always_right(tmp_path: Path) -> None:
    """Drafts of a layer that sees what the model's sees: a window, out of which the first token has gone."""
    model = write_random_model(tmp_path / "model", mistral.TINY | {"num_hidden_layers": 1, "sliding_window": 9})
    weights = load_file(model / "model.safetensors")
    # Then the norms before the layer and the head, which EAGLE's has not, change nothing that would be said.
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = rows / rows.square().mean(1, keepdim=True).sqrt()
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        weights[name] = torch.ones_like(weights[name])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    size = len(weights["model.norm.weight"])
    config = json.loads((model / "config.json").read_text())
    head = write_eagle(model, tmp_path / "head", **{name: config[name] for name in config if name != "sliding_window"})
    layer = {name.removeprefix("model."): each for name, each in weights.items() if "layers.0" in name}
    layer.pop("layers.0.input_layernorm.weight")
    fc = torch.cat((torch.eye(size), torch.zeros(size, size)), 1)
    save_file(layer | {"fc.weight": fc}, head / "model.safetensors")  # with the model's own embedding
    assert_all_accepted(model, written(head, tmp_path, CHAIN), [index % 50 for index in range(13)])


CHAIN = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]


def assert_all_accepted(model: Path, speculative: dict[str, Any], prompt: list[int], **options: Any) -> None:
    with LLM(model, **LIMITS | options, speculative=speculative) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=41, temperature=0))
        assert llm.stats.num_accepted_tokens == (8, 8, 8, 8) and llm.stats.num_steps == 9


def test_a_third_head_that_knows_what_follows_each_token_is_always_right(model: Path, tmp_path: Path) -> None:
    """For a model whose layers say nothing, so that each token depends on the one before it alone."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {"num_key_value_heads": 4, "norm_before_residual": True}
    head = write_eagle3(folder, tmp_path / "head", num_drafted=128, **config)
    planted = load_file(head / "model.safetensors")
    size = len(weights["model.norm.weight"])
    planted |= {
        "midlayer.input_layernorm.weight": weights["model.norm.weight"],
        "midlayer.self_attn.v_proj.weight": torch.cat((torch.eye(size), torch.zeros(size, size)), 1),
        "midlayer.self_attn.o_proj.weight": 1e4 * torch.eye(size),
        "midlayer.mlp.down_proj.weight": torch.zeros_like(planted["midlayer.mlp.down_proj.weight"]),
        "norm.weight": torch.ones(size),
        "lm_head.weight": weights["lm_head.weight"],
        "d2t": torch.zeros(128, dtype=torch.int64),
    }
    save_file(planted, head / "model.safetensors")
    # Where a token sees itself alone, attention gives the value that its embedding is.
    assert_all_accepted(folder, written(head, tmp_path, CHAIN), [3, 1, 4], max_attention_window_size=1)


def rewrite(head: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(head / "model.safetensors")
    change(tensors)
    save_file(tensors, head / "model.safetensors")


@pytest.mark.parametrize(
    ("what", "error", "sentence"),
    [
        ("no folder", ModelError, "has no model.safetensors; name a folder of an EAGLE head"),
        ("pickled", ModelError, "holds pytorch_model.bin, which is pickled.*save its tensors as model.safetensors"),
        ({"hidden_size": 65}, ModelError, "has hidden_size 65 and the model 64; take the head that was trained for it"),
        ({"vocab_size": 100}, ModelError, "has vocab_size 100 and the model 128; take the head"),
        ({"num_attention_heads": 8}, ModelError, r"self_attn\.[kqvo]_proj.weight \[.*need \[.*; take the head"),
        ("lacks", ModelError, "lacks fc.weight, which an EAGLE head has"),
        ("more", ModelError, "has layers.1.mlp.up_proj.weight, which no EAGLE head here has"),
        ("[[0], [1, 2]]", UsageError, r"has \[1, 2\] without \[1\]; add that one"),
        ("missing.json", UsageError, "choices missing.json cannot be read as JSON"),
    ],
)
def test_what_is_wrong_is_said(
    what: str | dict[str, Any], error: type[SlipstreamError], sentence: str, model: Path, tmp_path: Path
) -> None:
    head, choices = tmp_path / "head", {}
    if what != "no folder":
        write_eagle(model, head)
    if what == "pickled":
        (head / "model.safetensors").rename(head / "pytorch_model.bin")
    elif what == "lacks":
        rewrite(head, lambda tensors: tensors.pop("fc.weight"))
    elif what == "more":
        rewrite(head, lambda tensors: tensors.update({"layers.1.mlp.up_proj.weight": torch.ones(2)}))
    elif isinstance(what, dict):
        config = json.loads((head / "config.json").read_text())
        (head / "config.json").write_text(json.dumps(config | what))
    elif what != "no folder":
        choices = {"choices": what}
    with pytest.raises(error, match=sentence):
        LLM(model, **LIMITS, speculative={"method": "eagle", "model": str(head), **choices})


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        ("d2t", {}, "has a d2t that names tokens beyond the model's 128; take the head"),
        ("", {"eagle_aux_hidden_state_layer_ids": [2, 16, 29]}, "layer 16 reads, and the model has 3 layers; take"),
        ("", {"eagle_aux_hidden_state_layer_ids": "2"}, "layer_ids '2'; it must be a list of layers, such as"),
        ("", {"target_hidden_size": 4096}, "has target_hidden_size 4096 and the model 64; take the head"),
    ],
)
def test_what_is_wrong_of_a_third_head_is_said(
    change: str, config: dict[str, Any], sentence: str, model: Path, tmp_path: Path
) -> None:
    head = write_eagle3(model, tmp_path / "head", **config)
    if change:
        rewrite(head, lambda tensors: tensors[change].add_(60))
    with pytest.raises(ModelError, match=sentence):
        LLM(model, **LIMITS, speculative={"method": "eagle", "model": str(head)})
