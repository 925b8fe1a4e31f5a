"""Where a head is, and the file that holds its tensors, read with the checks that all heads need.

Heads that ship are in slipstream/speculative/<method>/heads/<name of the model>.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional

from slipstream.checkpoint.trtllm import heads, is_tensorrt_llm
from slipstream.engine.bounded_json import read_json
from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import ModelError, UsageError

Product = Callable[[Tensor], Tensor]  # by a matrix; before the last dimension any others
ToProduct = Callable[[Tensor, Tensor | None], Product]  # by a weight [N, K], with a bias [N]

CONFIG_FILE = "config.json"
DRAFT_TOKENS = "draft_token_ids"  # [D]: the tokens that a head drafts, where it shares these rows of the model's own


def torch_product(weight_NK: Tensor, bias_N: Tensor | None = None) -> Product:
    """Which autograd follows."""
    return partial(functional.linear, weight=weight_NK, bias=bias_N)


def head_folder(method: str, given: str, model: str) -> Path:
    """The one that was given, or else that of the head which ships for a model of this name.

    Raises UsageError where none does.
    """
    if given:
        return Path(given)
    heads = Path(__file__).parent / method / "heads"
    there = {path.name: path for path in sorted(heads.glob("*")) if path.is_dir()}
    if model not in there:
        raise UsageError(
            f"speculative lacks model, a folder: those of {method} that ship are for "
            f"{', '.join(there) or 'no model'}, not for {model}; train one with slipstream train-drafter --method "
            f"{method}."
        )
    return there[model]


class HeadFile(Protocol):
    """A TensorFile, or what is read like one."""

    @property
    def path(self) -> Path: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


@contextmanager
def open_head(
    folder: Path, method: str, weights_file: str, pickled_file: str, what: str
) -> Iterator[tuple[dict[str, Any], HeadFile]]:
    """Its config.json and its tensors, as they are published; a TensorRT-LLM folder that holds the head beside its
    model gives the same. `what` the folder should be, for the message. Raises ModelError where it is not.
    """
    values = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if is_tensorrt_llm(folder, values):
        config, tensors = heads.open_head(folder, values, method)
        with tensors:
            yield config, tensors
        return
    with _open_published(folder, weights_file, pickled_file, what) as file:
        yield read_json(folder / CONFIG_FILE), file


def _open_published(folder: Path, weights_file: str, pickled_file: str, what: str) -> TensorFile:
    if (folder / weights_file).is_file():
        return TensorFile.open(folder / weights_file)
    if (folder / pickled_file).is_file():
        raise ModelError(
            f"{folder} holds {pickled_file}, which is pickled, and nothing is ever unpickled here; save its "
            f"tensors as {weights_file}."
        )
    raise ModelError(f"{folder} has no {weights_file}; name a folder of {what}.")


def read_shaped(file: HeadFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """Raises ModelError for a tensor that is not there, or is that of a head for another model."""
    if name not in file.names():
        raise ModelError(f"{file.path} lacks {name}, which its config.json asks for; name a folder of a whole head.")
    if file.shape(name) != shape:
        raise ModelError(
            f"{file.path} has {name} {list(file.shape(name))}, and its config and the model need {list(shape)}; take "
            "the head that was trained for it."
        )
    return file.read(name)


def read_draft_tokens(file: HeadFile, vocab_size: int) -> Tensor | None:
    """[D] token ids; None for a head that has a product of its own for all tokens."""
    if DRAFT_TOKENS not in file.names():
        return None
    token_ids_D = file.read(DRAFT_TOKENS).long()
    if token_ids_D.ndim != 1 or not len(token_ids_D) or not 0 <= token_ids_D.min() <= token_ids_D.max() < vocab_size:
        raise ModelError(
            f"{file.path} drafts tokens that the model's {vocab_size} do not have; take the head that was trained "
            "for it."
        )
    return token_ids_D
