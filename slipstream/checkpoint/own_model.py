"""A model file of the user's own, outside the package: `--model_cls_file FILE` (docs/adding/model.md).

It is Python that the user names on the command line, and is run as such; nothing in a model's folder can name one.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

from torch import nn

from slipstream.errors import UsageError
from slipstream.models import ModelFile


@dataclass(frozen=True)
class OwnModel:
    path: Path
    class_name: str = "Model"

    def digest(self) -> str:
        """sha256 of the file's bytes and the class: what else it imports is not looked at."""
        return hashlib.sha256(self._source() + b":" + self.class_name.encode()).hexdigest()

    def load(self) -> ModelFile:
        """Import the file. Raises UsageError where that fails, or where it lacks what every model file has."""
        module = self._import()
        model = getattr(module, self.class_name, None)
        if not (isinstance(model, type) and issubclass(model, nn.Module)):
            classes = [name for name, each in vars(module).items() if isinstance(each, type)]
            raise UsageError(
                f"--model_cls_file {self.path} has no torch module called {self.class_name!r}; "
                f"name one with --model_cls_name, of {', '.join(classes) or 'none'}."
            )
        if not hasattr(getattr(module, "Config", None), "from_options"):
            raise UsageError(f"--model_cls_file {self.path} has no Config with from_options; docs/adding/model.md has.")
        if not isinstance(getattr(module, "WEIGHTS", None), dict):
            raise UsageError(f"--model_cls_file {self.path} has no WEIGHTS table; docs/adding/model.md has one.")
        optional: dict[str, Any] = {"IGNORED_WEIGHTS": (), "PROMISED_PASSES": (), "TINY": {}}
        return cast(ModelFile, SimpleNamespace(**optional | vars(module) | {"Model": model}))

    def _import(self) -> ModuleType:
        source = self._source()
        name = f"slipstream_own_model_{hashlib.sha256(source).hexdigest()[:16]}"
        if name in sys.modules:  # the same file: its classes must stay the same, too
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = str(self.path)
        sys.modules[name] = module  # dataclasses look themselves up there
        try:
            exec(compile(source, str(self.path), "exec"), vars(module))
        except Exception as error:
            del sys.modules[name]
            raise UsageError(
                f"--model_cls_file {self.path} cannot be imported ({type(error).__name__}: {error}); "
                "it must be a Python file like the one in docs/adding/model.md."
            ) from None
        return module

    def _source(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"--model_cls_file {self.path} cannot be read ({error.strerror}); give a Python file."
            ) from None
