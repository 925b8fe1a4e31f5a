"""Builds in these tests measure kernels for a moment only: which one wins is not what they are about."""

import importlib

import pytest


@pytest.fixture(autouse=True)
def quick_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = importlib.import_module("slipstream.build.tune")  # the package's attribute is the function
    monkeypatch.setattr(tune, "_ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(tune, "_COLD_BYTES", 1)
