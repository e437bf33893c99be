"""The facts of the flight-crew world: exercises, and the words a profile is made of.

What it is: one table of 48 exercises (name, gear, level, muscle group, goals, joints it loads) and the
closed lists that a profile chooses from. Written by this project's authors for this project; the
simplifications (one muscle group per exercise, at most two joints) are meant.
What it is not: medical advice.

The order of the catalogue is part of the world: gear first, then the exercises of the own weight, each
block from beginner to advanced. Answers list exercises in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

LEVELS = ("beginner", "intermediate", "advanced")
GOALS = ("strength", "endurance", "flexibility")
GROUPS = ("legs", "back", "chest", "arms", "core")
JOINTS = ("knee", "wrist", "spine", "shoulder")
GEAR = ("none", "bands", "dumbbells", "barbell")
LANGUAGES = ("en", "ru")
WORKOUTS = (1, 2, 3)
MOST_JOINTS = 2


@dataclass(frozen=True, slots=True)
class Exercise:
    """One row of the catalogue. `loads` are the joints for whose sake a profile forbids it, at least one."""

    name: str
    russian: str
    gear: str
    level: str
    group: str
    goals: tuple[str, ...]
    loads: tuple[str, ...]

    def named(self, language: str) -> str:
        return self.russian if language == "ru" else self.name


# name       Russian       level  group  goals                     loads
_TABLE = """
bands
sidestep     шаг           B      legs   strength,endurance        knee
pushdown     разгибание    B      arms   strength                  wrist
woodchop     дровосек      B      core   strength,endurance        spine
spread       разведение    B      back   strength,flexibility      shoulder
kickback     отведение     I      legs   endurance                 spine
passthrough  проворот      I      chest  flexibility               shoulder
sprint       спринт        A      legs   endurance                 knee
windmill     мельница      A      core   flexibility               spine,shoulder
dumbbells
goblet       гоблет        B      legs   strength,endurance        knee
curl         сгибание      B      arms   strength                  wrist
row          тяга          B      back   strength,endurance        spine
fly          разводка      B      chest  strength,flexibility      shoulder
swing        мах           I      legs   endurance                 spine
raise        подъём        I      arms   strength,endurance        shoulder
thruster     трастер       A      legs   endurance                 knee,shoulder
pullover     пуловер       A      chest  strength,flexibility      wrist
barbell
stepup       зашагивание   B      legs   strength,endurance        knee
bench        жим           B      chest  strength                  wrist
hinge        наклон        B      back   strength,flexibility      spine
shrug        шраг          B      arms   strength,endurance        shoulder
deadlift     становая      I      back   strength                  spine
rollout      выкат         I      core   strength,endurance        shoulder
clean        взятие        A      legs   strength,endurance        wrist
snatch       рывок         A      back   strength                  spine,shoulder
none
squat        приседание    B      legs   strength,endurance        knee
march        марш          B      core   endurance,flexibility     knee
camel        верблюд       B      back   strength,flexibility      knee
plank        планка        B      core   strength,endurance        wrist
table        столик        B      arms   strength,flexibility      wrist
cat          кошка         B      back   endurance,flexibility     wrist
crunch       скручивание   B      core   strength,endurance        spine
bridge       мостик        B      legs   strength,flexibility      spine
twist        поворот       B      chest  endurance,flexibility     spine
boxer        боксёр        B      arms   strength,endurance        shoulder
pike         горка         B      back   strength,flexibility      shoulder
opener       раскрытие     B      chest  endurance,flexibility     shoulder
lunge        выпад         I      legs   strength                  knee
frog         лягушка       I      legs   flexibility               knee
climber      скалолаз      I      core   endurance                 wrist
pushup       отжимание     I      chest  strength,endurance        wrist
superman     лодочка       I      back   strength,endurance        spine
swimmer      пловец        I      arms   endurance,flexibility     shoulder
pistol       пистолет      A      legs   strength                  knee
burpee       бёрпи         A      chest  endurance                 knee,wrist
handstand    стойка        A      arms   strength                  wrist,shoulder
fold         складка       A      core   endurance,flexibility     spine
bow          корзинка      A      back   flexibility               spine
archer       лучник        A      chest  strength                  shoulder
"""


def _read(table: str) -> tuple[Exercise, ...]:
    levels = {level[0].upper(): level for level in LEVELS}
    rows: list[Exercise] = []
    gear = ""
    for line in table.strip().splitlines():
        cells = line.split()
        if len(cells) == 1:
            gear = cells[0]
            continue
        name, russian, level, group, goals, loads = cells
        rows.append(
            Exercise(
                name, russian, gear, levels[level], group, tuple(goals.split(",")), tuple(loads.split(","))
            )
        )
    return tuple(rows)


CATALOGUE = _read(_TABLE)
RANK = MappingProxyType({level: rank for rank, level in enumerate(LEVELS)})
PLACE = MappingProxyType({exercise.name: place for place, exercise in enumerate(CATALOGUE)})
BY_NAME = MappingProxyType(
    {language: {exercise.named(language): exercise for exercise in CATALOGUE} for language in LANGUAGES}
)
