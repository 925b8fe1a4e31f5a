"""The public names, recorded: adding one is a decision, losing one breaks somebody."""

import tomllib
from importlib import import_module

import pytest

import slipstream
from tests.surface.sources import ROOT

PUBLIC = ["LLM", "CompletionOutput", "Guided", "RequestOutput", "SamplingParams", "__version__", "errors"]

STATIONS = {  # not at the root, where the packages `build` and `checkpoint` have these names
    "slipstream.checkpoint": "convert",
    "slipstream.quantize": "quantize",
    "slipstream.build": "build",
}

REWRITING = {  # what a pass outside the package is written with
    "slipstream.build.rewrite": ["Match", "Rewrite", "Rule", "Symbol", "ops"],
    "slipstream.build.example": ["trace"],
    "slipstream.kernels.registry": ["kernel", "op"],
}


def test_all_is_the_recorded_list() -> None:
    assert sorted(slipstream.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(slipstream))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_can_be_imported(name: str) -> None:
    assert getattr(slipstream, name) is not None


@pytest.mark.parametrize(("module", "name"), STATIONS.items())
def test_each_station_has_its_function(module: str, name: str) -> None:
    assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("module", REWRITING)
def test_the_names_of_rewriting_are_public(module: str) -> None:
    assert sorted(import_module(module).__all__) == REWRITING[module]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="LLMs"):
        _ = slipstream.LLMs


def test_version_is_the_one_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert slipstream.__version__ == project["version"]


def test_every_error_is_in_the_tree_at_the_top_of_errors() -> None:
    tree = slipstream.errors.__doc__ or ""
    for name, value in vars(slipstream.errors).items():
        if isinstance(value, type):
            assert issubclass(value, slipstream.errors.SlipstreamError)
            assert name in tree
