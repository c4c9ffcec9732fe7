"""Marks for parameter sets."""

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A parameter set that the fast tier skips."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)
