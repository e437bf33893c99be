"""Everything that Samovar refuses, as one tree.

    SamovarError
    ├── RecipeError        a recipe, or a setting in it, can not be used (all problems at once)
    ├── InputError         a file or text that the user gave: missing, empty, wrong encoding
    ├── ModelError         a model or tokenizer that this step can not take
    │   └── Diverged       a training whose loss is no number any more
    ├── ArtifactError      something Samovar wrote earlier is missing, altered or unfinished
    ├── RunError           a run directory can not be used as asked
    │   └── RunLocked      another process holds it
    ├── StopRequested      the user asked to stop; what was done so far is kept
    └── MissingError       a package, program, network or device that is needed is not there

The message says what was seen and what was allowed; `hint` says what to do next. The command line
prints both and no traceback. An exception outside this tree is a defect of ours.
"""

from __future__ import annotations


class SamovarError(Exception):
    """Base of all refusals. `hint` is the next thing the user can do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class RecipeError(SamovarError):
    """`problems` holds every fault found, one line each; the message joins them."""

    def __init__(self, problems: list[str], *, hint: str = "") -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = problems


class InputError(SamovarError):
    """A file or a text from outside is not what the step needs."""


class ModelError(SamovarError):
    """A model or tokenizer does not fit the step, or does not fit its partner."""


class Diverged(ModelError):
    """The loss of a training is NaN or infinite; its last checkpoint stands."""


class ArtifactError(SamovarError):
    """Something written by an earlier step is missing, altered or unfinished."""


class RunError(SamovarError):
    """A run directory can not be used as asked."""


class RunLocked(RunError):
    """The run directory is held by a living process."""


class StopRequested(SamovarError):
    """Raised inside a stage when a stop was asked for; its partial work stays for the next run."""


class MissingError(SamovarError):
    """A package, program, network or device that the step needs is not there."""
