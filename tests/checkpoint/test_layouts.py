"""WEIGHTS tables, read in both directions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.checkpoint.layouts import Recipe, from_hugging_face, pattern, theirs_shape, to_hugging_face
from slipstream.errors import CorruptFile
from slipstream.models import known_models, llama, model_file, read_config
from slipstream.schema.weights import Rows, Stacked, WeightTable


def rows_of(*values: float) -> Tensor:
    """A row of equal numbers for each value."""
    return torch.tensor(values)[:, None].expand(-1, 2).contiguous()


def cook(recipes: dict[str, Recipe], pantry: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: recipe.make([pantry[source] for source in recipe.sources]) for name, recipe in recipes.items()}


QKV = ("layers.{i}.q", "layers.{i}.k", "layers.{i}.v")
OURS = {"layers.0.q": rows_of(1, 2, 3, 4), "layers.0.k": rows_of(5, 6), "layers.0.v": rows_of(7, 8)}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Rows(QKV), rows_of(1, 2, 3, 4, 5, 6, 7, 8)),
        (Rows(QKV, groups="num_kv_heads"), rows_of(1, 2, 5, 7, 3, 4, 6, 8)),
        (Rows(QKV, is_transposed=True), rows_of(1, 2, 3, 4, 5, 6, 7, 8).t()),
        (Rows(QKV, groups="num_kv_heads", is_transposed=True), rows_of(1, 2, 5, 7, 3, 4, 6, 8).t()),
    ],
)
def test_one_of_theirs_holds_several_of_ours(layout: Rows, expected: Tensor) -> None:
    check({"h.{i}.qkv": layout}, OURS, {"h.0.qkv": expected})


def test_biases_have_rows_of_one_number() -> None:
    ours = {name: tensor[:, 0] for name, tensor in OURS.items()}
    table = {"h.{i}.qkv": Rows(QKV, groups="num_kv_heads")}
    check(table, ours, {"h.0.qkv": torch.tensor([1.0, 2, 5, 7, 3, 4, 6, 8])})


def test_experts_are_slices_of_one_tensor() -> None:
    ours = {"layers.3.up": torch.arange(24.0).view(3, 2, 4)}
    theirs = {f"h.3.experts.{e}.up": ours["layers.3.up"][e] for e in range(3)}
    check({"h.{i}.experts.{e}.up": Stacked("layers.{i}.up")}, ours, theirs)


def check(table: WeightTable, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    config = SimpleNamespace(num_kv_heads=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    back = to_hugging_face(table, config, shapes)
    assert {name: theirs_shape(recipe, shapes) for name, recipe in back.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
    given = cook(back, ours)
    assert list(given) == list(theirs)
    assert all(torch.equal(given[name], tensor) for name, tensor in theirs.items())
    recipes, left_over = from_hugging_face(table, config, shapes, theirs, "here")
    assert not left_over
    assert {theirs_name: recipe.source_shape for recipe in recipes.values() for theirs_name in recipe.sources} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
    taken = cook(recipes, theirs)
    assert set(taken) == set(ours)
    assert all(torch.equal(taken[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("model_type", known_models())
def test_every_model_goes_there_and_back(model_type: str) -> None:
    model, config = read_config(model_file(model_type).TINY, "tiny")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in model.Model(config).named_parameters()}
    ours = {name: torch.randn(shape) for name, shape in shapes.items()}
    theirs = cook(to_hugging_face(model.WEIGHTS, config, shapes), ours)
    recipes, left_over = from_hugging_face(model.WEIGHTS, config, shapes, theirs, "here")
    assert not left_over
    assert {source for recipe in recipes.values() for source in recipe.sources} == set(theirs)
    for recipe in recipes.values():
        assert all(tuple(theirs[source].shape) == recipe.source_shape for source in recipe.sources)
    taken = cook(recipes, theirs)
    assert all(torch.equal(taken[name], tensor) for name, tensor in ours.items())


def test_a_name_that_is_not_ours_has_no_way_back() -> None:
    with pytest.raises(KeyError, match=r"model\.norm\.weight"):
        to_hugging_face(llama.WEIGHTS, None, {"model.norm.weight": (4,)})


EXPERTS = {"e.{e}.up": Stacked("up"), "f.{e}.up": Stacked("up"), "up": "whole", "whole": "whole"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["e.0.up", "e.2.up"], "here lacks expert 1 of 3 for up; there is e.0.up"),
        (["e.0.up", "e.1.up", "e.2.up", "e.3.up"], "e.3.up is of an expert too many; the config has 3"),
        (["e.0.up", "f.0.up"], "both e.0.up and f.0.up, which are the same weight"),
        (["up", "whole"], "both up and whole, which are the same weight"),
    ],
)
def test_what_does_not_add_up_is_named(found: list[str], message: str) -> None:
    shapes: dict[str, Any] = {"up": (3, 2), "whole": (2,)}
    with pytest.raises(CorruptFile, match=message):
        from_hugging_face(EXPERTS, None, shapes, found, "here")


def test_a_pattern_matches_whole_ascii_names_only() -> None:
    rule = pattern("layers.{i}.{p}_proj.weight")
    assert rule.fullmatch("layers.12.q_proj.weight")
    for name in (
        "layers.x.q_proj.weight",
        "layers.1.q_projXweight",
        "layers.١.q_proj.weight",
        "layers.1.Q_proj.weight",
    ):
        assert not rule.fullmatch(name)
