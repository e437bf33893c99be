"""Stage `distill.synthesize`: a teacher writes training data, filters keep the good, nothing is asked twice.

Prompts come from a profile grid, from items, or from seed tasks (Self-Instruct: Wang et al., arXiv 2212.10560);
each is answered by several candidates, of which one is kept by a rule. This is the path of AviationKD
(67,392 pairs from a teacher), and "three candidates, the shortest valid one" is how RuAdapt's data was chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill.synthesize import grid
from distill.synthesize.address import address
from distill.synthesize.asks import Teacher
from distill.synthesize.ledger import Ledger
from distill.synthesize.plan import make_plan
from distill.synthesize.template import EXAMPLES, NAME, shipped
from distill.synthesize.validators import VALIDATORS
from distill.synthesize.work import Synthesis
from foundation import gguf_header
from foundation.dataio import write_jsonl
from foundation.filters import Script
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one

_FREE: dict[str, Any] = {"fingerprint": False}  # it can not change an answer


class Settings(StageSettings):
    """What is asked, how often, of whom, and what is kept."""

    template: str = Field("", description="name of a shipped prompt template; empty = the role 'template'")
    grid: dict[str, tuple[str | int, ...]] = Field(
        {}, description="profile grid: axis -> its values; every combination is a prompt"
    )
    fields: dict[str, str] = Field(
        {}, description="placeholder -> key of items and seeds, such as instances.0.input"
    )
    prompts: int = Field(0, ge=0, description="prompts to ask, drawn without replacement; 0 = all")
    held_share: float = Field(0.0, ge=0, lt=1, description="share of cells or items that is never asked")
    few_shot: int = Field(8, ge=1, le=50, description="seed tasks in a prompt; a quarter from kept answers")
    catalogue_entries: int = Field(40, ge=12, le=500, description="exercises of the catalogue in a prompt")
    past_workouts: int = Field(5, ge=0, le=20, description="past workouts in a prompt")

    candidates: int = Field(1, ge=1, le=16, description="answers to each prompt")
    temperature: float = Field(0.7, ge=0, le=5, description="of the teacher's answers; 0 = the likeliest token")
    top_p: float = Field(0.9, gt=0, le=1, description="fewest tokens whose probability reaches this")
    max_new_tokens: int = Field(
        512, ge=1, le=32768, description="longest answer; one that reaches it is rejected"
    )

    min_characters: int = Field(1, ge=1, description="shorter answers are rejected")
    max_characters: int = Field(0, ge=0, description="longer answers are rejected; 0 = no limit")
    script: Script = Field("any", description="script that the answer's letters should have")
    script_share: float = Field(0.7, ge=0, le=1, description="least share of letters in `script`")
    validator: str = Field("none", description=f"rules an answer must obey: {', '.join(VALIDATORS)}")
    duplicate_jaccard: float = Field(
        0.7,
        ge=0,
        le=1,
        description="word 3-gram overlap with a kept one that makes an answer a repeat; 0 = off",
    )
    duplicate_of: Literal["user", "assistant", "both"] = Field(
        "assistant", description="which side of the conversation is compared for repeats"
    )
    choose: Literal["first", "shortest", "judge"] = Field(
        "first", description="which valid candidate is kept: the first, the shortest, or the judge's best"
    )
    judge_template: str = Field("", description="template with which the teacher scores its answers")
    judge_least: int = Field(1, ge=0, description="lowest score that is kept")
    judge_tokens: int = Field(256, ge=1, le=4096, description="longest judgement")
    give_up_prompts: int = Field(
        64, ge=1, description="so many prompts in a row without a kept answer end the stage with an error"
    )

    base_url: str = Field(
        "", description="OpenAI-compatible endpoint, http(s)://host/v1; empty = role 'teacher'"
    )
    endpoint_model: str = Field("", description="model name that the endpoint is asked for")
    key_variable: str = Field(
        "", pattern="^([A-Za-z_][A-Za-z0-9_]*)?$", description="environment variable that holds the key"
    )
    left_out: tuple[Literal["temperature", "top_p", "max_tokens", "seed"], ...] = Field(
        (), description="keys of the request that the endpoint refuses"
    )
    timeout_seconds: float = Field(
        120, gt=0, le=3600, description="longest wait for one answer", json_schema_extra=_FREE
    )
    tries: int = Field(6, ge=1, le=50, description="attempts at one answer", json_schema_extra=_FREE)
    parallel: int = Field(4, ge=1, le=256, description="requests under way at once", json_schema_extra=_FREE)
    price_in: float = Field(0.0, ge=0, description="price of a million prompt tokens", json_schema_extra=_FREE)
    price_out: float = Field(0.0, ge=0, description="price of a million answer tokens", json_schema_extra=_FREE)

    batch_prompts: int = Field(16, ge=1, le=4096, description="prompts in a round")
    slots: int = Field(8, ge=1, le=64, description="answers computed side by side by a local teacher")
    context_tokens: int = Field(4096, ge=64, description="context of a GGUF teacher: prompt and answer")
    gpu_layers: int = Field(0, ge=-1, description="layers of a GGUF teacher on the GPU; -1 = all")

    @field_validator("template", "judge_template")
    @classmethod
    def _is_shipped(cls, name: str) -> str:
        if name and name not in shipped():
            raise ValueError(f"no such template; shipped are {', '.join(shipped())}")
        return name

    @field_validator("validator")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in VALIDATORS:
            raise ValueError(f"no such validator; known are {', '.join(VALIDATORS)}")
        return name

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if url:
            address(url)
        return url

    @field_validator("grid")
    @classmethod
    def _is_a_grid(cls, axes: dict[str, tuple[str | int, ...]]) -> dict[str, tuple[str | int, ...]]:
        wrong = [f"{name!r} is no name of a placeholder" for name in axes if not NAME.fullmatch(name)]
        wrong += [f"{name}: no values" for name, values in axes.items() if not values]
        wrong += [f"{name}: a value stands twice" for name, v in axes.items() if len(set(map(str, v))) < len(v)]
        wrong += [f"{name} is filled by the seeds" for name in axes if name == EXAMPLES]
        if not wrong and grid.size(axes) > grid.MAX_CELLS:
            wrong.append(f"{grid.size(axes)} cells; at most {grid.MAX_CELLS}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return axes

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        wrong = []
        if self.candidates > 1 and self.temperature == 0:
            wrong.append("candidates > 1 at temperature 0 are all the same answer")
        if (self.choose == "judge") != bool(self.judge_template):
            wrong.append("choose = 'judge' and judge_template go together")
        if bool(self.base_url) != bool(self.endpoint_model):
            wrong.append("base_url and endpoint_model go together")
        if self.key_variable and not self.base_url:
            wrong.append("key_variable has no effect without base_url")
        if self.max_characters and self.max_characters < self.min_characters:
            wrong.append(f"max_characters {self.max_characters} < min_characters {self.min_characters}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Ask `teacher`, or the endpoint, about the grid, `items` or `seeds`; write the data and what was rejected.

    Raises InputError with every fault of what is asked about, ModelError when the teacher answers nothing
    that is kept, MissingError when the endpoint can not be used. Answers of earlier runs (`answers`) count.
    """
    plan = make_plan(settings, inputs)
    ledger = Ledger(out / ".work" / "answers.jsonl", many(inputs, "answers"), report)
    try:
        teacher = _teacher(settings, inputs, report)
        try:
            figures = Synthesis(plan, teacher, ledger, report).run(out)
        finally:
            teacher.close()
        with (out / "answers.jsonl").open("wb") as file:
            file.writelines(ledger.published())
    finally:
        ledger.close()
    write_jsonl(out / "held.jsonl", plan.held_records())
    return {**figures, "held": len(plan.held), "unfit_cells": plan.unfit}


def _teacher(settings: Settings, inputs: Inputs, report: Report) -> Teacher:
    if settings.base_url:
        from distill.synthesize.endpoint import Endpoint, Where

        if settings.key_variable and settings.base_url.lower().startswith("http:"):
            report.note(f"the key travels unencrypted to {settings.base_url}; use https beyond this machine")
        return Endpoint(
            Where(
                settings.base_url,
                settings.endpoint_model,
                settings.key_variable,
                settings.timeout_seconds,
                settings.tries,
                settings.parallel,
                settings.left_out,
            )
        )
    from distill.synthesize.local import GgufTeacher, TransformersTeacher

    path = one(inputs, "teacher")
    if path.is_dir() and ((path / "config.json").exists() or not gguf_header.files(path)):
        return TransformersTeacher(path, settings.slots)
    return GgufTeacher(
        path, slots=settings.slots, context_tokens=settings.context_tokens, gpu_layers=settings.gpu_layers
    )
