"""A user's own passes: the example of docs/adding/pass.md, run as it is printed; and a sentence for each mistake."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.build import cache
from slipstream.build.example import trace
from slipstream.build.extensions import digest_of_sources, load_passes
from slipstream.build.pipeline import run_pipeline
from slipstream.build.rewrite import Rewrite, Rule, ops
from slipstream.checkpoint import resolve
from slipstream.engine.graph import Graph
from slipstream.errors import BuildError, EngineError, UsageError
from slipstream.kernels import registry
from slipstream.schema.build import BuildConfig
from tests.build.support import assert_same
from tests.surface.sources import ROOT

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPT = [3, 5, 7, 11]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/adding/pass.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def here(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder that holds the page's module, and mistakes of all kinds."""
    folder = tmp_path_factory.mktemp("user")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (folder / "swiglu_pass.py").write_text(source, encoding="utf-8")
    (folder / "broken_pass.py").write_text("1 / 0\n", encoding="utf-8")
    (folder / "no_pass.py").write_text("PASS = 5\n", encoding="utf-8")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    assert Path.cwd() == before
    registry._OPS.pop("swiglu_linear", None)  # other tests walk the ops that are ours


def test_the_page_s_pass_changes_its_example_and_computes_the_same() -> None:
    (found,) = load_passes(["swiglu_pass:PASS"])
    module = sys.modules["swiglu_pass"]
    before, after = module.example(), module.example()
    assert found.run(after) == 1
    assert_same(before, after)


def test_the_page_s_pass_runs_in_a_build_and_generates_the_same(tiny_model: Path) -> None:
    limits = {"max_batch_size": 2, "kv_cache_max_tokens": 256}
    with LLM(tiny_model, **limits) as plain, LLM(tiny_model, extra_passes=["swiglu_pass:PASS"], **limits) as fused:
        assert "swiglu_linear" in {node.op for node in fused._folder.graph.nodes}
        assert fused.manifest.op_modules == ["swiglu_pass"]
        reports = {report["name"]: report for report in fused.manifest.passes}
        assert reports["fuse_swiglu_linear"]["matches"] == 3
        assert list(reports).index("last_token") < list(reports).index("fuse_swiglu_linear")
        assert list(reports).index("fuse_swiglu_linear") < list(reports).index("fold_constants")
        expected = plain.generate(PROMPT, GREEDY).outputs[0].token_ids
        assert fused.generate(PROMPT, GREEDY).outputs[0].token_ids == expected
        assert plain.manifest.op_modules == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere:PASS", r"The module 'nowhere' cannot be imported \(ModuleNotFoundError"),
        ("broken_pass:PASS", r"The module 'broken_pass' cannot be imported \(ZeroDivisionError"),
        ("swiglu_pass:PASSES", r"swiglu_pass:PASSES is no pass; it must be a Rewrite"),
        ("no_pass:PASS", r"no_pass:PASS is no pass; it must be a Rewrite"),
        ("swiglu", r"No installed package offers a pass called 'swiglu' \(there are: none\); write it as module:name"),
    ],
)
def test_a_pass_that_cannot_be_had_is_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_passes([name])


def test_an_entry_point_is_used_when_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = here / "site" / "swiglu-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: swiglu\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[slipstream.passes]\nswiglu = swiglu_pass:PASS\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(here / "site"))
    assert load_passes(["swiglu"]) == load_passes(["swiglu_pass:PASS"])
    with pytest.raises(UsageError, match="there are: swiglu"):
        load_passes(["silu"])


def test_the_cache_tells_engines_of_other_passes_apart(tiny_model: Path, here: Path) -> None:
    def key() -> str:
        config = BuildConfig(extra_passes=("swiglu_pass:PASS",))
        return cache._key(resolve(tiny_model), config, torch.device("cpu"))

    plain = cache._key(resolve(tiny_model), BuildConfig(), torch.device("cpu"))
    first = key()
    assert first != plain
    assert key() == first
    with (here / "swiglu_pass.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert key() != first


def test_all_files_of_a_package_count(here: Path) -> None:
    package = here / "my_passes"
    package.mkdir()
    (package / "__init__.py").write_text("from swiglu_pass import PASS\n", encoding="utf-8")
    (package / "helper.py").write_text("A = 1\n", encoding="utf-8")
    before = digest_of_sources(["my_passes:PASS"])
    (package / "helper.py").write_text("A = 2\n", encoding="utf-8")
    assert digest_of_sources(["my_passes:PASS"]) != before


# ----- passes that break the graph


class Broken:
    name, benefit = "my_pass", "none"

    def run(self, graph: Graph) -> int:
        raise KeyError("oh")


class Unknown(Broken):
    def run(self, graph: Graph) -> int:
        graph.nodes[0] = type(graph.nodes[0])("magic", graph.nodes[0].inputs, graph.nodes[0].outputs)
        return 1


class Forgetful(Broken):
    def run(self, graph: Graph) -> int:
        del graph.nodes[0]
        return 1


class Retyping(Broken):
    def run(self, graph: Graph) -> int:
        graph.outputs = ("y",)
        return 1


class Borrowed(Broken):
    name = "fuse_qkv"


ENDLESS = Rewrite("my_pass", "none", (Rule(lambda x, y: ops.mul(x, y), lambda x, y: ops.mul(y, x)),))
UNFIT = Rewrite("my_pass", "none", (Rule(lambda x, y: ops.mul(x, y), lambda x, y: ops.add(x, ops.silu_and_mul(y))),))


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Broken(), "the pass my_pass failed with KeyError: 'oh'"),
        (Unknown(), "the pass my_pass broke the graph: .*calls 'magic', which is no op"),
        (Forgetful(), "the pass my_pass broke the graph: .*which nothing before it writes"),
        (Borrowed(), "a pass of yours is called 'fuse_qkv'"),
        (ENDLESS, "the pass my_pass broke the graph: its pattern finds what its replacement makes"),
        (Retyping(), r"the pass my_pass broke the graph: its outputs became float32\[T, 4\], not float32\[T, 8\]"),
        (UNFIT, "the pass my_pass broke the graph: .*does not take"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_pass_that_breaks_the_graph_is_named(broken: object, sentence: str) -> None:
    graph = trace(lambda x, y, w: ops.mul(ops.silu(x), ops.linear(y, w)), {"x": ("T", 8), "y": ("T", 4)}, {"w": (8, 4)})
    with pytest.raises(BuildError, match=sentence):
        run_pipeline(graph, promised=(), disabled=(), extra=[broken])  # type: ignore[list-item]


def test_an_engine_built_already_takes_no_pass(tiny_model: Path) -> None:
    with LLM(tiny_model, max_batch_size=2, kv_cache_max_tokens=64) as llm:
        folder = llm._folder.path
    with pytest.raises(EngineError, match="built already"):
        LLM(folder, extra_passes=["swiglu_pass:PASS"])
