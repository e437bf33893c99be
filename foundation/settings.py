"""Base class of every stage's settings: strict, frozen, and with no unknown keys."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field


class StageSettings(BaseModel):
    """Settings of one stage, as written in a recipe. Each field states its unit and meaning.

    `seed` comes from the recipe unless the stage sets its own; it is all the randomness a stage has.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)

    seed: int = Field(17, ge=0, lt=2**31, description="seed of all randomness in this stage")

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that have another value than their default: what a setting without effect is."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
