"""Stage `corpora.world`: write the flight-crew world's texts, instruction pairs, held-out profiles and tasks.

It reads nothing. Each file is drawn from its own stream of random numbers, named after the file, so asking
for more Russian documents does not change the English ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from pydantic import Field

from corpora.world.baseline import constant_share
from corpora.world.facts import LANGUAGES
from corpora.world.pairs import pairs, question
from corpora.world.profiles import every_profile, split
from corpora.world.tasks import answers, choices, known_facts
from corpora.world.text import documents
from foundation.dataio import write_jsonl
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs

NAMES = {"en": "english", "ru": "russian"}


class Settings(StageSettings):
    documents: int = Field(6000, ge=1, le=100_000, description="training documents in each language")
    held_documents: int = Field(400, ge=0, le=10_000, description="held-out documents in each language")
    pairs_per_profile: int = Field(
        4, ge=1, le=30, description="instruction pairs for each training profile in each language"
    )
    held_profiles: int = Field(200, ge=1, le=1000, description="profiles kept out of pairs and texts")
    history: bool = Field(
        False, description="give each profile past workouts, and the rule that goes with them"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write all files; each is rewritten whole, so a second call after a kill starts over in seconds."""
    train, held = split(
        every_profile(history=settings.history, seed=settings.seed), settings.held_profiles, settings.seed
    )
    figures: Figures = {"train_profiles": len(train), "held_profiles": len(held)}

    def stream(name: str) -> Random:
        return Random(f"{settings.seed} {name}")

    for done, language in enumerate(LANGUAGES):
        name = NAMES[language]
        stop_if_asked(report)
        texts = documents(language, settings.documents, stream(name), train)
        kept = documents(language, settings.held_documents, stream(f"{name}_held"), train, avoid=texts)
        made = pairs(train, language, settings.pairs_per_profile, stream(f"chat_{name}"))
        write_jsonl(out / f"{name}.jsonl", ({"text": text} for text in texts))
        write_jsonl(out / f"{name}_held.jsonl", ({"text": text} for text in kept))
        write_jsonl(out / f"chat_{name}.jsonl", made)
        tasks = {
            f"tasks_choices_{name}": choices(held, language, stream(f"tasks_choices_{name}")),
            f"tasks_facts_{name}": known_facts(language, stream(f"tasks_facts_{name}")),
            f"tasks_answers_{name}": answers(held, language, stream(f"tasks_answers_{name}")),
        }
        for task, items in tasks.items():
            write_jsonl(out / f"{task}.jsonl", items)
        figures |= {
            f"{name}_documents": len(texts),
            f"{name}_characters": sum(map(len, texts)),
            f"{name}_held_documents": len(kept),
            f"{name}_pairs": len(made),
        }
        report.progress(done + 1, len(LANGUAGES), "language")
    write_jsonl(
        out / "profiles.jsonl",
        (
            {"language": language, "messages": question(profile, language), "profile": profile.to_dict()}
            for language in LANGUAGES
            for profile in held
        ),
    )
    figures["constant_share"] = constant_share(held)
    report.note(f"one constant answer satisfies {figures['constant_share']:.3f} of the held-out profiles")
    (out / "world.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures
