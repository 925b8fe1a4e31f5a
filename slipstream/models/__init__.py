"""The architectures, one file per Hugging Face model_type. The folder is the registry: the file name is the model_type.

A model file holds `Config` (with `from_options`), `Model` (its forward reads like the paper, on one device, without
quantization, sharding or fusion), `WEIGHTS` (Hugging Face name → ours), and `TINY` (a small config.json for tests).
"""

import importlib
import pkgutil
from typing import Any, Protocol

from torch import Tensor, nn

from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.schema.model import DecoderConfig, Options
from slipstream.schema.weights import WeightTable


class ModelFile(Protocol):
    WEIGHTS: WeightTable
    IGNORED_WEIGHTS: tuple[str, ...]
    PROMISED_PASSES: tuple[str, ...]
    TINY: dict[str, Any]

    class Config(DecoderConfig):
        @classmethod
        def from_options(cls, options: Options) -> DecoderConfig:
            raise NotImplementedError

    class Model(nn.Module):
        def __init__(self, config: DecoderConfig) -> None: ...
        def forward(self, step: Any, kv: list[Tensor]) -> Tensor:
            raise NotImplementedError


def known_models() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def model_file(model_type: str) -> ModelFile:
    """The module that defines this architecture."""
    if model_type not in known_models():
        raise UnsupportedModel(f"model_type {model_type!r} is not known; known are {', '.join(known_models())}.")
    return importlib.import_module(f"{__name__}.{model_type}")


def read_config(values: dict[str, Any], source: str, own: ModelFile | None = None) -> tuple[ModelFile, DecoderConfig]:
    """A Hugging Face config.json as the model file that runs it and that file's own config.

    own: a user's model file, which runs it whatever its model_type.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise CorruptFile(f"{source}: model_type is {model_type!r}; it must be one of {', '.join(known_models())}.")
    found = own or model_file(model_type)
    options = Options(values, source)
    config = found.Config.from_options(options)
    options.finish(model_type)
    return found, config
