"""The words of a prompt, in both languages: how a profile's values are said."""

from __future__ import annotations

from types import MappingProxyType

from corpora.world.facts import GEAR, GOALS, GROUPS, JOINTS, LEVELS

_RUSSIAN = MappingProxyType(
    {
        "beginner": "начальный",
        "intermediate": "средний",
        "advanced": "продвинутый",
        "strength": "сила",
        "endurance": "выносливость",
        "flexibility": "гибкость",
        "legs": "ноги",
        "back": "спина",
        "chest": "грудь",
        "arms": "руки",
        "core": "пресс",
        "knee": "колено",  # accusative: "Беречь: колено, поясницу"
        "wrist": "запястье",
        "spine": "поясницу",
        "shoulder": "плечо",
        "none": "нет",
        "bands": "эспандер",
        "dumbbells": "гантели",
        "barbell": "штанга",
    }
)


def _both(values: tuple[str, ...]) -> MappingProxyType[str, dict[str, str]]:
    return MappingProxyType(
        {"en": {value: value for value in values}, "ru": {value: _RUSSIAN[value] for value in values}}
    )


LEVEL_WORDS = _both(LEVELS)
GOAL_WORDS = _both(GOALS)
GROUP_WORDS = _both(GROUPS)
JOINT_WORDS = _both(JOINTS)
GEAR_WORDS = _both(GEAR)
