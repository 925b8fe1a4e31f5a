"""What is measured in these tests is not what they are about: moments, and a machine of small sizes."""

import pytest

from slipstream.bench import machine
from slipstream.build import timing


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 1e-5)
    monkeypatch.setattr(timing, "_COLD_BYTES", 1)
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(machine.PRODUCT_SIZE, "cpu", 64)
