"""Every recipe that ships is one that runs: it is checked as a user's would be."""

from __future__ import annotations

from pathlib import Path

import pytest

from samovar.recipe import load
from samovar.stages import KINDS, resolve

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("short", [False, True])
def test_it_is_fine(path: Path, short: bool) -> None:
    assert load(path, short=short).name == path.stem


def test_short_keeps_every_stage_of_the_quickstart() -> None:
    path = next(path for path in RECIPES if path.stem == "quickstart")
    whole, short = load(path), load(path, short=True)
    assert [(s.name, s.kind) for s in whole.stages] == [(s.name, s.kind) for s in short.stages]
    trained = {s.name for s in whole.stages if hasattr(s.settings, "steps")}
    fewer = {
        a.name
        for a, b in zip(whole.stages, short.stages, strict=True)
        if a.name in trained and b.settings.steps < a.settings.steps
    }
    assert fewer == trained


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_setting_takes_a_word_that_a_stage_needs_itself(kind: str) -> None:
    """A setting called `name` could never be written in a recipe."""
    settings = resolve(KINDS[kind].settings)
    assert not {"name", "kind", "reads"} & set(settings.model_fields)
