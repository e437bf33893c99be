"""Preparing a corpus: repeats out, held-out texts never in training, and the files' order does not matter."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reports import StopsAfter

from corpora import prepare
from corpora.prepare import Digests, Settings, run
from foundation.dataio import documents, write_jsonl
from foundation.errors import InputError, StopRequested
from foundation.report import Silent


def texts(path: Path) -> set[str]:
    return {json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_clean_split_and_order(tmp_path: Path) -> None:
    stories = [f"История номер {n}." for n in range(300)]
    write_jsonl(tmp_path / "a.jsonl", ({"story": s} for s in stories))
    write_jsonl(tmp_path / "b.jsonl", ({"story": s + "  \n"} for s in reversed(stories)))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    chosen = Settings(field="story", held_share=0.2)
    one = run(chosen, {"corpus": (tmp_path / "a.jsonl", tmp_path / "b.jsonl")}, tmp_path / "one", Silent())
    run(chosen, {"corpus": (tmp_path / "b.jsonl", tmp_path / "a.jsonl")}, tmp_path / "two", Silent())
    kept, held = texts(tmp_path / "one" / "text.jsonl"), texts(tmp_path / "one" / "held.jsonl")
    assert kept | held == set(stories) and not kept & held
    assert 30 < len(held) < 90
    assert one["repeated"] == 300
    assert texts(tmp_path / "two" / "held.jsonl") == held


def test_forms_of_one_letter_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ёж и йод\n\nе\u0308ж и и\u0306од\n", encoding="utf-8")
    figures = run(Settings(held_share=0), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())
    assert figures["kept"] == 1 and figures["repeated"] == 1
    assert list(documents([tmp_path / "text.jsonl"])) == ["ёж и йод"]


def test_the_first_line_stays_indented_and_is_no_other_text(tmp_path: Path) -> None:
    code = "    def f():\n        return 1"
    texts = [f"\n \n{code}  \n\n", code.strip(), "\tword ", " word"]
    write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    figures = run(Settings(held_share=0), {"corpus": (tmp_path / "a.jsonl",)}, tmp_path, Silent())
    assert list(documents([tmp_path / "text.jsonl"])) == [code, "\tword"] and figures["repeated"] == 2


def test_what_is_held_out_depends_on_the_seed_and_the_text_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ({"text": f"История номер {n}."} for n in range(200)))
    held = []
    for seed in (1, 1, 2):
        run(Settings(held_share=0.5, seed=seed), {"corpus": (tmp_path / "a.jsonl",)}, tmp_path, Silent())
        held.append(texts(tmp_path / "held.jsonl"))
        (tmp_path / ".work" / "state.json").unlink(missing_ok=True)
    assert held[0] == held[1] != held[2]


def test_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n")
    with pytest.raises(InputError, match="no document is left"):
        run(Settings(min_characters=100), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())


def test_all_kinds_of_files_at_once_and_what_was_read(tmp_path: Path) -> None:
    russian = ["Жила-была девочка Маша, и была у неё сестра.", "Мама мыла раму, а рама сияла на солнце."]
    (tmp_path / "old.txt").write_bytes("\n\n".join(russian).encode("cp1251"))
    (tmp_path / "new.jsonl.gz").write_bytes(
        gzip.compress('{"text": null}\n{"text": "A tale, retold"}\n{"text": "ёж"}\n{"text": " "}'.encode())
    )
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "tested"}])
    write_jsonl(
        tmp_path / "set" / "train.jsonl", [{"text": "from a folder"}, {"text": "no\0thing"}, {"text": "ёж"}]
    )
    report = Silent()
    inputs = {"corpus": tuple(tmp_path / name for name in ("old.txt", "new.jsonl.gz", "set"))}
    figures = run(Settings(held_share=0, min_characters=3, max_characters=41), inputs, tmp_path, report)
    assert list(documents([tmp_path / "text.jsonl"])) == [russian[1], "A tale, retold", "from a folder"]
    dropped = {"short": 2, "long": 1, "nul": 1, "repeated": 0}
    assert figures.items() >= {"read": 7, "blank": 2, "kept": 3, "held": 0, "sources": 3, **dropped}.items()
    assert figures["encodings"] == "cp1251 1, utf-8 2"
    cyrillic = sum("CYRILLIC" in unicodedata.name(c) for c in russian[1] if c.isalpha())
    latin = sum(map(str.isalpha, "A tale, retold from a folder"))
    assert figures["cyrillic_share"] == round(cyrillic / (cyrillic + latin), 4)
    assert figures["latin_share"] == round(latin / (cyrillic + latin), 4)
    beyond_ascii = sum(ord(c) > 127 for text in russian for c in text)
    sources = [json.loads(line) for line in (tmp_path / "sources.jsonl").read_text().splitlines()]
    assert sources == [
        {"source": "old.txt", "encoding": "cp1251", "documents": 2, "blank": 0,
         "characters": sum(map(len, russian)), "short": 0, "long": 1, "nul": 0, "repeated": 0, "kept": 1,
         "held": 0, "cyrillic_share": 1.0, "latin_share": 0.0},
        {"source": "new.jsonl.gz", "encoding": "utf-8", "documents": 2, "blank": 2, "characters": 16,
         "short": 1, "long": 0, "nul": 0, "repeated": 0, "kept": 1, "held": 0, "cyrillic_share": 0.0,
         "latin_share": 1.0},
        {"source": "train.jsonl", "encoding": "utf-8", "documents": 3, "blank": 0, "characters": 23,
         "short": 1, "long": 0, "nul": 1, "repeated": 0, "kept": 1, "held": 0, "cyrillic_share": 0.0,
         "latin_share": 1.0},
    ]  # fmt: skip
    assert report.notes[0].endswith("1 files read, 1 left out, such as test.jsonl")
    assert report.notes[-1].startswith("3 sources, 2 blank rows, 7 documents: 2 too short, ")
    assert report.notes[1].startswith(f"old.txt: cp1251, judged by {beyond_ascii} characters")


def test_ascii_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a tale\n")
    assert (
        run(Settings(held_share=0), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())["encodings"]
        == "ascii 1"
    )


def test_an_encoding_can_be_forced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("да".encode("koi8-r"))
    with pytest.raises(InputError, match=r"a\.txt, line 1: .* can not be told") as caught:
        run(Settings(), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())
    assert 'encoding = "cp1251"' in caught.value.hint
    figures = run(
        Settings(encoding="KOI8-R", held_share=0), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent()
    )
    assert list(documents([tmp_path / "text.jsonl"])) == ["да"] and figures["encodings"] == "koi8-r 1"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"encoding": "cp125l"}, "no such encoding: 'cp125l'"),
        ({"encoding": "rot13"}, "no such encoding"),
        ({"encoding": "undefined"}, "no such encoding: 'undefined'"),
        ({"min_characters": 9, "max_characters": 8}, "max_characters 8 is below min_characters"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**wrong)


def test_only_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n\none\n\none\n\ntwo\n\nthree\n")
    chosen = Settings(held_share=0, max_documents=2, min_characters=2)
    assert run(chosen, {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())["read"] == 4
    assert list(documents([tmp_path / "text.jsonl"])) == ["one", "two"]


FILES = ("text.jsonl", "held.jsonl", "sources.jsonl")


def corpus(folder: Path) -> tuple[Path, ...]:
    """Three sources with repeats within and between them; two have blank rows and nulls, one is in cp1251."""
    rnd = random.Random(3)
    texts = [f"Это рассказ о мальчике, у которого было {rnd.randrange(900)} яблок." for _ in range(1500)]
    blank = [{"text": None}, {"text": " "}]
    write_jsonl(folder / "a.jsonl", (row for text in texts[:700] for row in ({"text": text}, *blank)))
    (folder / "b.txt").write_bytes("\n\n".join(texts[700:1100]).encode("cp1251"))
    write_jsonl(folder / "c.jsonl", [*blank, *({"text": text} for text in texts[1100:]), *blank * 30])
    return tuple(folder / name for name in ("a.jsonl", "b.txt", "c.jsonl"))


def test_stopped_and_resumed_again_and_again_it_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"corpus": corpus(tmp_path)}
    monkeypatch.setattr(prepare, "REPORT_DOCUMENTS", 37)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    figures = run(Settings(held_share=0.3), inputs, tmp_path / "whole", Silent())
    stops = 0
    while True:
        try:
            again = run(Settings(held_share=0.3), inputs, tmp_path / "parts", StopsAfter(4))
            break
        except StopRequested:
            stops += 1
            with (tmp_path / "parts" / ".work" / "text.jsonl").open("ab") as file:
                file.write(b'{"text": "half a li')  # as after a kill: more than the checkpoint counts
    assert stops >= 5 and again == figures and figures["blank"] == 2 * 700 + 2 + 60
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_killed_between_its_last_acts_it_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"corpus": corpus(tmp_path)}
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(prepare, "CHECKPOINT_SECONDS", 0.0)
    figures = run(Settings(), inputs, tmp_path / "out", Silent())
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    (tmp_path / "out" / "held.jsonl").replace(tmp_path / "out" / ".work" / "held.jsonl")
    assert run(Settings(), inputs, tmp_path / "out", Silent()) == figures
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == before


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(1, 20), max_size=3000))
def test_digests_are_a_set(numbers: list[int]) -> None:
    digests, known = Digests(), {0}
    for number in numbers:
        number = number or 1
        assert digests.add(number) == (number not in known)
        known.add(number)
    assert len(digests) == len(known) - 1


def test_digests_stay_right_while_they_grow() -> None:
    digests, rnd = Digests(), random.Random(1)
    numbers = [rnd.getrandbits(64) for _ in range(20_000)]
    assert all(digests.add(number) for number in numbers)
    assert not any(digests.add(number) for number in numbers)
    assert digests._slots.itemsize * len(digests._slots) < 22 * len(digests)


MEASURE = """
import resource, sys
from pathlib import Path
from corpora.prepare import Settings, run
from foundation.report import Silent
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(Settings(), {"corpus": (folder / "big.jsonl",)}, folder, Silent())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_follow_the_corpus(tmp_path: Path) -> None:
    rnd = random.Random(1)
    with (tmp_path / "big.jsonl").open("w") as file:
        for _ in range(15_000):
            file.write(json.dumps({"text": rnd.randbytes(1000).hex()}) + "\n")
    size_bytes = (tmp_path / "big.jsonl").stat().st_size
    root = Path(prepare.__file__).parents[1]
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True, cwd=root
    )
    assert size_bytes > 30e6 and int(said.stdout) < 0.25 * size_bytes
