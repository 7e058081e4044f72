"""What the tests of several solvers are run with."""

import pytest

from slimlm.kernels import compression
from tests.conftest import needs_kernels


@pytest.fixture(params=["torch", pytest.param("C++", marks=needs_kernels)])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of torch and those in C++ in turn: the laws hold for both."""
    if request.param == "torch":
        monkeypatch.setattr(compression, "available", lambda: False)
