"""The kernels of a GPU: on one where there is one, else in Triton's interpreter, at small shapes."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def loops_in_the_interpreter() -> None:
    """Triton 3.6 makes a loop's bound an int in a way that numpy 2.4 no longer takes."""
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
