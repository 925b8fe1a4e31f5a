"""Builds in these tests measure kernels for a moment only: which one wins is not what they are about."""

import pytest

from slipstream.build import timing


@pytest.fixture(autouse=True)
def quick_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "_COLD_BYTES", 1)
