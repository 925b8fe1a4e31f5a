"""Where a head is, and the file that holds its tensors, read with the checks that all heads need.

Heads that ship are in slipstream/speculative/<method>/heads/<name of the model>.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import ModelError, UsageError

Product = Callable[[Tensor], Tensor]  # by a matrix; before the last dimension any others

DRAFT_TOKENS = "draft_token_ids"  # [D]: the tokens that a head drafts, where it shares these rows of the model's own


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
            f"speculative lacks model, a folder of a head: those of {method} that ship are for "
            f"{', '.join(there) or 'no model'}, not for {model}; train one with slipstream train-drafter --method "
            f"{method}."
        )
    return there[model]


def open_head(folder: Path, weights_file: str, pickled_file: str, what: str) -> TensorFile:
    """`what` the folder should be, for the message. Raises ModelError where weights_file is not there."""
    if (folder / weights_file).is_file():
        return TensorFile.open(folder / weights_file)
    if (folder / pickled_file).is_file():
        raise ModelError(
            f"{folder} holds {pickled_file}, which is pickled, and nothing is ever unpickled here; save its "
            f"tensors as {weights_file}."
        )
    raise ModelError(f"{folder} has no {weights_file}; name a folder of {what}.")


def read_shaped(file: TensorFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """Raises ModelError for a tensor that is not there, or is that of a head for another model."""
    if name not in file.names():
        raise ModelError(f"{file.path} lacks {name}, which its config.json asks for; name a folder of a whole head.")
    if file.shape(name) != shape:
        raise ModelError(
            f"{file.path} has {name} {list(file.shape(name))}, and its config and the model need {list(shape)}; take "
            "the head that was trained for it."
        )
    return file.read(name)


def read_draft_tokens(file: TensorFile, vocab_size: int) -> Tensor | None:
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
