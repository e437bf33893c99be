"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def samovar_data() -> Path:
    """The real data: $SAMOVAR_DATA, else ../shared/data beside the repository; else the test is skipped."""
    named = os.environ.get("SAMOVAR_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        seen = f"SAMOVAR_DATA names {named}" if named else f"SAMOVAR_DATA is not set and there is no {folder}"
        pytest.skip(f"real data is missing: {seen}")
    return folder
