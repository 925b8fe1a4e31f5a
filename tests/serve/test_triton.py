"""What stands around the real Triton server: model repositories, their keys, its launch; and the desk inside it."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream import LLM, SamplingParams
from slipstream.api.outputs import CompletionOutput
from slipstream.errors import RequestError, UsageError
from slipstream.serve.triton import server as server_module
from slipstream.serve.triton.bls import ANSWER, GENERATED, PREPARED, TO_ENGINE, TO_PREPROCESSING
from slipstream.serve.triton.desk import Desk
from slipstream.serve.triton.engine import llm_options
from slipstream.serve.triton.groups import TokenGroups
from slipstream.serve.triton.repository import MODELS, TEMPLATES
from slipstream.serve.triton.server import IN_WHEEL, WheelServer, find_server
from slipstream.serve.triton.template import fill, open_keys, parse_substitutions
from slipstream.serve.triton.words import pack_words, unpack_words
from slipstream.text.detokenize import Detokenizer
from slipstream.text.tokenizer import Tokenizer
from tests.cli.conftest import Call
from tests.serve.triton_server import free_ports

# --- keys ---


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a:1,b:False", {"a": "1", "b": "False"}),
        ("engine_dir:/data/a:b", {"engine_dir": "/data/a:b"}),
        ('engine_dir:"/data/a,b:c",x:1', {"engine_dir": "/data/a,b:c", "x": "1"}),
        (r'a:"say \"yes\", \\n"', {"a": r'say "yes", \n'}),
        ("a:,b:2", {"a": "", "b": "2"}),
    ],
)
def test_substitutions_are_read(text: str, values: dict[str, str]) -> None:
    assert parse_substitutions(text) == values


@pytest.mark.parametrize("text", ["nonsense", "a:1,,b:2", "a:1,a:2", 'a:"open', 'a:"x"y', "a b:1"])
def test_substitutions_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_substitutions(text)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(st.characters(codec="utf-8"), max_size=20))
)
def test_any_value_survives_quoting(values: dict[str, str]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    assert parse_substitutions(",".join(f"{key}:{quoted(value)}" for key, value in values.items())) == values


def test_values_are_escaped_where_the_template_quotes_them() -> None:
    template = 'string_value: "${path}" count: ${count}'
    assert fill(template, {"path": 'a"b\\c'}, "x") == 'string_value: "a\\"b\\\\c" count: ${count}'
    with pytest.raises(UsageError, match="count is 'two words'"):
        fill(template, {"count": "two words"}, "x")


def test_a_key_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"config has no key \$\{b\} to fill; it has a, c"):
        fill('"${a}" ${c}', {"b": "1"}, "config")


# --- the repository, by the command line ---


def test_init_leaves_exactly_the_keys_of_the_guide(call: Call, tmp_path: Path) -> None:
    done = call("triton", "init", "--model_repo", tmp_path / "repo")
    assert done.code == 0, done.err
    keys = {name: open_keys((tmp_path / "repo" / name / "config.pbtxt").read_text()) for name in MODELS}
    tokenizer = {"tokenizer_dir", "tokenizer_type", "triton_max_batch_size"}
    assert set(keys["preprocessing"]) == tokenizer | {"preprocessing_instance_count"}
    assert set(keys["postprocessing"]) == tokenizer | {"postprocessing_instance_count"}
    assert set(keys["ensemble"]) == {"triton_max_batch_size"}
    assert set(keys["tensorrt_llm_bls"]) == {
        "triton_max_batch_size", "decoupled_mode", "bls_instance_count", "accumulate_tokens",
    }  # fmt: skip
    assert set(keys["tensorrt_llm"]) == {
        "triton_max_batch_size", "decoupled_mode", "max_beam_width", "engine_dir", "max_tokens_in_paged_kv_cache",
        "max_attention_window_size", "kv_cache_free_gpu_mem_fraction", "exclude_input_in_output",
        "enable_kv_cache_reuse", "batching_strategy", "max_queue_delay_microseconds",
    }  # fmt: skip
    again = call("triton", "init", "--model_repo", tmp_path / "repo")
    assert again.code == 2 and "add --force" in again.err
    assert call("triton", "init", "--model_repo", tmp_path / "repo", "--force").code == 0


def test_fill_template_writes_in_place_only_where_asked(call: Call, tmp_path: Path) -> None:
    call("triton", "init", "--model_repo", tmp_path / "repo")
    file = tmp_path / "repo" / "ensemble" / "config.pbtxt"
    before = file.read_text()
    printed = call("triton", "fill-template", file, "triton_max_batch_size:64")
    assert "max_batch_size: 64\n" in printed.out and file.read_text() == before
    assert call("triton", "fill-template", "-i", file, "triton_max_batch_size:64").code == 0
    assert file.read_text() == printed.out
    again = call("triton", "fill-template", "-i", file, "triton_max_batch_size:32")
    assert again.code == 2 and "all of its keys are filled" in again.err
    assert call("triton", "fill-template", tmp_path / "none", "a:1").code == 2


def test_the_ensemble_and_the_bls_model_are_wired_alike() -> None:
    text = (TEMPLATES / "ensemble" / "config.pbtxt").read_text()
    steps = {part.partition('"')[0]: part for part in text.split('model_name: "')[1:]}

    def links(step: str, kind: str) -> dict[str, str]:
        return dict(re.findall(rf'{kind} {{ key: "(\w+)" value: "(\w+)" }}', steps[step]))

    assert links("preprocessing", "input_map") == {theirs: ours for ours, theirs in TO_PREPROCESSING.items()}
    prepared = {name: PREPARED[output] for output, name in links("preprocessing", "output_map").items()}
    to_engine = {ours: theirs for theirs, ours in links("tensorrt_llm", "input_map").items()}
    assert to_engine == {**prepared, **TO_ENGINE}
    generated = {output: GENERATED[output] for output in links("tensorrt_llm", "output_map")}
    assert {f"_{name}": name for name in generated.values()} == {
        value: key for key, value in links("postprocessing", "input_map").items()
    }
    assert links("postprocessing", "output_map") == ANSWER
    bls = (TEMPLATES / "tensorrt_llm_bls" / "config.pbtxt").read_text()
    assert re.search(r"^input \[.*?^\]$", text, re.M | re.S)[0] == re.search(r"^input \[.*?^\]$", bls, re.M | re.S)[0]  # type: ignore[index]


# --- launching what cannot start ---


@pytest.fixture
def repo(call: Call, engine: Path, tmp_path: Path) -> Path:
    assert call("triton", "init", "--model_repo", tmp_path / "repo", "--engine_dir", engine).code == 0
    return tmp_path / "repo"


def test_launch_refuses_what_could_never_work(
    call: Call, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*words: object) -> str:
        done = call("triton", "launch", *words)
        assert done.code == 2, done
        return done.err

    wrong = error("--model_repo", repo, "--world_size", 2)
    assert "--world_size is 2, but" in wrong and "has one rank; give --world_size 1" in wrong
    assert "holds no model" in error("--model_repo", tmp_path / "empty")
    assert "--tritonserver is" in error("--model_repo", repo, "--tritonserver", tmp_path / "nothing")
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\necho 'error: creating server: no luck today'\nexit 3\n")
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = ["--http_port", free_ports(1)[0], "--grpc_port", port]
        busy = error("--model_repo", repo, "--tritonserver", program, "--force", *others)
        assert f"127.0.0.1:{port} cannot be listened on" in busy
    http, grpc, metrics = free_ports(3)
    ports = ["--http_port", http, "--grpc_port", grpc, "--metrics_port", metrics]
    failed = error("--model_repo", repo, "--tritonserver", program, "--force", *ports)
    assert "tritonserver ended before it was ready (exit code 3): error: creating server: no luck today" in failed
    monkeypatch.setenv("TRITONSERVER", str(program))
    config = repo / "postprocessing" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 4"))
    assert "postprocessing_instance_count is 4" in error("--model_repo", repo)
    config.write_text(config.read_text().replace('"auto"', '"${tokenizer_type}"'))
    unfilled = error("--model_repo", repo)
    assert "${tokenizer_type}" in unfilled and f"fill-template -i {config} tokenizer_type:VALUE" in unfilled


def test_the_server_is_found_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("given", "variable", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tritonserver").write_text("#!/bin/sh\n")
        (tmp_path / name / "tritonserver").chmod(0o755)
    environment = {"PATH": str(tmp_path / "path"), "TRITONSERVER": str(tmp_path / "variable" / "tritonserver")}
    assert find_server(tmp_path / "given" / "tritonserver", environment).parent.name == "given"
    assert find_server(None, environment).parent.name == "variable"
    del environment["TRITONSERVER"]
    assert find_server(None, environment).parent.name == "path"
    monkeypatch.setattr(server_module, "IN_CONTAINER", tmp_path / "path" / "tritonserver")
    assert find_server(None, {"PATH": ""}).parent.name == "path"
    monkeypatch.setattr(server_module, "IN_CONTAINER", tmp_path / "none")
    monkeypatch.setattr(server_module, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"slipstream\[triton-server\]"):
        find_server(None, {"PATH": ""})


def test_what_would_hang_or_crash_later_is_refused_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / IN_WHEEL).parent.mkdir(parents=True)
    (site / "numpy-2.1.0.dist-info").mkdir()
    metadata = site / "numpy-2.1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.0\n")
    monkeypatch.setattr(server_module, "WORKING_PYTHON", (2, 7))
    with pytest.raises(UsageError, match=r"use Python 3\.11"):
        WheelServer(site, tmp_path / "links")
    monkeypatch.undo()
    monkeypatch.setattr(server_module, "WORKING_PYTHON", server_module.sys.version_info[:2])
    with pytest.raises(UsageError, match=r"NumPy is 2\.1\.0"):
        WheelServer(site, tmp_path / "links")
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    with pytest.raises(UsageError, match="is missing; install again"):
        WheelServer(site, tmp_path / "links")
    monkeypatch.setattr(server_module.sysconfig, "get_config_var", lambda _name: str(tmp_path))
    monkeypatch.setattr(server_module.ctypes, "CDLL", _no_library)
    with pytest.raises(UsageError, match="was built without it"):
        WheelServer(site, tmp_path / "other")


def _no_library(_name: str) -> Any:
    raise OSError


@pytest.mark.parametrize(
    ("key", "value"),
    [("batching_strategy", "sometimes"), ("max_tokens_in_paged_kv_cache", "many"), ("enable_kv_cache_reuse", "maybe")],
)
def test_keys_of_the_engine_are_checked(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{key} is '{value}'"):
        llm_options({"engine_dir": "e", key: value})


# --- words and groups ---


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=5))
def test_words_come_back_as_they_were_packed(words: list[list[int]]) -> None:
    assert unpack_words(pack_words(words), "x") == [tuple(word) for word in words]


@pytest.mark.parametrize("packed", [[[1, 2], [3, -1]], [[1, 2], [2, 1]], [[1, 2], [0, -1]], [[1, 2]]])
def test_ends_of_words_that_are_none_are_refused(packed: list[list[int]]) -> None:
    with pytest.raises(RequestError):
        unpack_words(np.array([packed], np.int32), "bad_words_list")


@pytest.fixture(scope="module")
def tokenizer(engine: Path) -> Tokenizer:
    return Tokenizer.open(engine / "tokenizer")


@given(data=st.data())
def test_groups_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """However the engine's steps and the stop matcher cut a stream."""
    text = data.draw(st.text(st.sampled_from("aé日🙂 .\n"), min_size=1, max_size=30))
    token_ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(text)))  # a stop string begins here; the end: there is none
    groups, given = TokenGroups(tokenizer, (5,)), []
    num_tokens = num_characters = 0
    while num_tokens < len(token_ids):
        num_tokens = data.draw(st.integers(num_tokens + 1, len(token_ids)))
        known = len(tokenizer.decode(token_ids[:num_tokens]).rstrip("\ufffd"))
        num_characters = data.draw(st.integers(num_characters, max(num_characters, min(cut, known))))
        given.append(groups.take(CompletionOutput(0, text[:num_characters], token_ids[:num_tokens])))
    stop = "stop" if cut < len(text) else None
    end = CompletionOutput(0, text[:cut], token_ids, finish_reason="stop" if stop else "length", stop_reason=stop)
    given.append(groups.take(end))
    shown = []
    for group in given:
        detokenizer = Detokenizer(tokenizer, (5,))
        shown.append(detokenizer.push(group) + detokenizer.finish())
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) == text[:cut]


def test_the_token_that_ends_a_text_is_not_given_out(tokenizer: Tokenizer) -> None:
    output = CompletionOutput(0, "", [1], finish_reason="stop", stop_reason=1)
    assert TokenGroups(tokenizer, (5,)).take(output) == []


# --- the desk ---


@dataclass
class Letterbox:
    """A reply that keeps what is sent."""

    sent: list[dict[str, np.ndarray]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    is_cancelled: bool = False

    def send(self, values: Any, is_last: bool) -> None:
        self.sent.append(values)
        if is_last:
            self.ended.set()

    def fail(self, error: Exception) -> None:
        self.errors.append(error)
        self.ended.set()

    def close(self) -> None:
        self.ended.set()


def ask(llm: LLM, max_tokens: int, **more: Any) -> Any:
    from slipstream.serve.triton.ask import Ask

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    values = {"name": "", "streaming": False, "return_log_probs": False, "pad_id": 0, **more}
    return Ask(make=lambda name: llm.request_maker.request(name, (5, 6, 7), sampling), **values)


@pytest.fixture
def llm(engine: Path) -> Iterator[LLM]:
    with LLM(engine) as llm:
        yield llm


def test_a_hung_engine_fails_its_requests_and_gives_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lost, hang = threading.Event(), threading.Event()
    monkeypatch.setattr(llm.loop._engine, "step", lambda: hang.wait() and [])
    desk = Desk(llm, step_timeout=0.3, exclude_input=True, on_stats=lambda _stats: None, give_up=lost.set)
    replies = [Letterbox(), Letterbox()]
    started = time.monotonic()
    for reply in replies:
        desk.take(ask(llm, 20, name="mine"), reply)
    assert lost.wait(30)
    assert time.monotonic() - started >= 0.3
    assert all("no step for 0.3 seconds" in str(reply.errors[0]) for reply in replies)
    assert capfd.readouterr().err.count("request id 'mine', 3 prompt tokens") == 2
    monkeypatch.undo()
    hang.set()


def test_an_idle_engine_is_not_taken_for_hung(llm: LLM) -> None:
    lost = threading.Event()
    desk = Desk(llm, step_timeout=1.0, exclude_input=False, on_stats=lambda _stats: None, give_up=lost.set)
    assert not lost.wait(2.5)
    reply = Letterbox()
    desk.take(ask(llm, 4), reply)
    assert reply.ended.wait(30) and not reply.errors
    assert reply.sent[0]["output_ids"][0, 0, :3].tolist() == [5, 6, 7]  # exclude_input_in_output:False
    assert reply.sent[0]["sequence_length"].tolist() == [[7]]
    desk.close()
    assert not lost.is_set()


def test_closing_fails_what_still_runs(llm: LLM) -> None:
    desk = Desk(llm, step_timeout=9, exclude_input=True, on_stats=lambda _stats: None, give_up=lambda: None)
    reply = Letterbox()
    desk.take(ask(llm, 240, streaming=True), reply)
    desk.close()
    assert reply.ended.is_set() and "being stopped" in str(reply.errors[0])
