"""From a user's files to training text: decoded, normalised, without exact repeats, and with a held-out part.

Texts go from the readers to the disk one by one; what stays in memory is a digest of 8 bytes for each text that
was kept. Near-duplicates and quality filters are stages of their own.

A stage that was stopped or killed goes on from its last checkpoint to the same bytes: .work/ holds the outputs
so far, and state.json how much of them counts and how many documents of which source had been read by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field, field_validator, model_validator

from corpora.encodings import AUTO, canonical
from corpora.readers import Choice, Source, documents_in, sources_of
from foundation.dataio import write_jsonl
from foundation.errors import InputError
from foundation.files import read_json, write_json
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many

CHECKPOINT_SECONDS = 20.0
REPORT_DOCUMENTS = 200
PARTS = ("text", "held")
DROPPED = {"short": "too short", "long": "too long", "nul": "with NUL characters", "repeated": "repeated"}
SCRIPTS = ("cyrillic", "latin")
_CYRILLIC = re.compile(r"[\u0400-\u052f]+")
_LATIN = re.compile(r"[A-Za-zªºÀ-ÖØ-öø-ʸ]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_as_json = json.JSONEncoder(ensure_ascii=False).encode


class Settings(StageSettings):
    """What is read, what is dropped, and how much is held out."""

    field: str = Field("text", min_length=1, description="key or column of the text")
    split: str = Field("train", min_length=1, description="split of a dataset's folder")
    subset: str = Field("", description="subset of a dataset's folder; empty = its default")
    encoding: str = Field(AUTO, description="encoding of text files, such as cp1251; auto = found out for each")
    min_characters: int = Field(1, ge=1, description="shorter documents are dropped")
    max_characters: int = Field(0, ge=0, description="longer documents are dropped; 0 = none")
    max_documents: int = Field(0, ge=0, description="documents that are used, from the start; 0 = all")
    held_share: float = Field(
        0.02, ge=0, lt=1, description="share of documents held out, by a hash of text and seed"
    )

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str) -> str:
        try:
            return encoding if encoding == AUTO else canonical(encoding)
        except LookupError:
            raise ValueError(f"no such encoding: {encoding!r}; auto, utf-8, cp1251, koi8-r and so on") from None

    @model_validator(mode="after")
    def _has_room(self) -> Settings:
        if 0 < self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters")
        return self


@dataclass
class Tally:
    """What became of the documents so far; written to state.json as it is.

    What is counted of all is counted of the source at hand, the last of `sources`, under the same name. Blank
    rows are no documents: of those, a source has what its reader had passed by the last document that counts.
    """

    counts: Counter[str] = field(default_factory=Counter)
    sources: list[dict[str, Any]] = field(default_factory=list)  # one for each source that was begun
    written_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    @property
    def blank(self) -> int:
        return sum(source.get("blank", 0) for source in self.sources)

    def count(self, what: str, number: int = 1) -> None:
        source = self.sources[-1]
        self.counts[what] += number
        source[what] = source.get(what, 0) + number


class Digests:
    """A set of 64-bit numbers in 11 to 21 bytes each: open addressing in an array, doubled when 3/4 full."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, number: int) -> bool:
        """True when `number` was not in the set before."""
        number = number or 1  # 0 is an empty slot
        if self._count * 4 >= len(self._slots) * 3:
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for each in old:
                if each:
                    self._slots[self._place(each)] = each
        place = self._place(number)
        if self._slots[place]:
            return False
        self._slots[place] = number
        self._count += 1
        return True

    def _place(self, number: int) -> int:
        """The slot of `number`, or the empty one where it belongs."""
        slots, last = self._slots, len(self._slots) - 1
        place = number & last
        while slots[place] and slots[place] != number:
            place = (place + 1) & last
        return place


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/text.jsonl (training), out/held.jsonl and out/sources.jsonl (what was read) from `corpus`."""
    choice = Choice(settings.field, settings.split, settings.subset, settings.encoding)
    sources = sources_of(many(inputs, "corpus"), choice, report)
    work = out / ".work"
    work.mkdir(exist_ok=True)
    tally, digests = _resumed(work)
    with ExitStack() as stack:
        files = {part: stack.enter_context((work / f"{part}.jsonl").open("ab")) for part in PARTS}
        _sort(settings, sources, tally, digests, files, work / "state.json", report)
    counts = tally.counts
    if not counts["kept"]:
        raise InputError(
            f"no document is left to train on ({_told(tally)})",
            hint="lower min_characters or held_share, or raise max_characters",
        )
    write_jsonl(out / "sources.jsonl", map(_source_row, tally.sources))
    for part in PARTS:
        (work / f"{part}.jsonl").replace(out / f"{part}.jsonl")
    encodings = Counter(source["encoding"] for source in tally.sources if source["encoding"])
    report.note(f"{len(tally.sources)} sources, {_told(tally)}")
    return {
        "blank": tally.blank,
        **{name: counts[name] for name in ("read", *DROPPED, "kept", "held")},
        "characters": counts["characters"],
        "sources": len(tally.sources),
        "encodings": ", ".join(f"{name} {count}" for name, count in sorted(encodings.items())),
        **_shares(counts),
    }


def _source_row(source: Mapping[str, Any]) -> dict[str, Any]:
    """A line of sources.jsonl: what was read, where it went, and the scripts of what was not dropped."""
    counts = {name: source.get(name, 0) for name in ("blank", "characters", *DROPPED, "kept", "held")}
    told = {"source": source["source"], "encoding": source["encoding"], "documents": source.get("read", 0)}
    return told | counts | _shares(source)


def _shares(counts: Mapping[str, Any]) -> dict[str, float]:
    """The share of each script in the letters."""
    letters = max(1, counts.get("letters", 0))
    return {f"{script}_share": round(counts.get(f"{script}_letters", 0) / letters, 4) for script in SCRIPTS}


def _told(tally: Tally) -> str:
    counts = tally.counts
    told = ", ".join(f"{counts[why]} {said}" for why, said in DROPPED.items())
    kept = f"{counts['kept']} kept, {counts['held']} held out"
    return f"{tally.blank} blank rows, {counts['read']} documents: {told}; {kept}"


def _sort(
    settings: Settings,
    sources: list[Source],
    tally: Tally,
    digests: Digests,
    files: Mapping[str, BinaryIO],
    state: Path,
    report: Report,
) -> None:
    """Read on from where `tally` stands, and put every document where it belongs."""
    saved = time.monotonic()
    total_bytes = sum(source.size_bytes for source in sources)
    for text in _texts(sources, tally):
        part = _verdict(text, settings, digests, tally)
        if part:
            line = _as_json({"text": text}) + "\n"
            tally.written_bytes[part] += files[part].write(line.encode())
        if 0 < settings.max_documents <= len(digests):
            return
        if tally.counts["read"] % REPORT_DOCUMENTS == 0:
            done_bytes = sum(source.done_bytes for source in sources)
            report.progress(done_bytes, total_bytes, unit="byte", documents=tally.counts["read"])
            if report.stop_requested() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(tally, files, state)
                saved = time.monotonic()
                stop_if_asked(report)
    report.progress(total_bytes, total_bytes, unit="byte", documents=tally.counts["read"])


def _texts(sources: list[Source], tally: Tally) -> Iterator[str]:
    """Every document that was not read before, cleaned, each counted for its source."""
    for place, source in enumerate(sources):
        if place + 1 < len(tally.sources):  # read to its end before the checkpoint
            source.done_bytes = source.size_bytes
            continue
        if place == len(tally.sources):
            tally.sources.append({"source": source.name, "encoding": ""})
        seen = tally.sources[place]
        for text in islice(documents_in(source), seen.get("read", 0), None):
            seen["encoding"], seen["blank"] = source.encoding, source.blank
            tally.count("read")
            tally.count("characters", len(text))
            yield _clean(text)
        seen["encoding"], seen["blank"] = source.encoding, source.blank  # the one of ASCII is known at its end


def _verdict(text: str, settings: Settings, digests: Digests, tally: Tally) -> str:
    """The part that `text` goes to, or "" when it is dropped; counted either way."""
    why = ""
    if len(text) < settings.min_characters:
        why = "short"
    elif 0 < settings.max_characters < len(text):
        why = "long"
    elif "\0" in text:
        why = "nul"
    elif not digests.add(_digest(text)):
        why = "repeated"
    if why:
        tally.count(why)
        return ""
    for kind, runs in (("cyrillic_letters", _CYRILLIC), ("latin_letters", _LATIN), ("letters", _LETTERS)):
        tally.count(kind, sum(map(len, runs.findall(text))))
    is_held = _draw(text, settings.seed) < settings.held_share
    tally.count("held" if is_held else "kept")
    return "held" if is_held else "text"


def _clean(text: str) -> str:
    """NFC, no white space at the ends of lines, no empty line first or last; the first line stays indented."""
    return "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).splitlines()).strip("\n")


def _digest(text: str) -> int:
    """64 bits: two of a hundred million texts share them, and one is lost, once in three thousand corpora.

    Texts that differ in the indentation of their first line are one.
    """
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big")


def _draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed, never on the order of the files."""
    digest = hashlib.blake2b(f"{seed}\0{text.strip()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _save(tally: Tally, files: Mapping[str, BinaryIO], state: Path) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_json(state, {name: getattr(tally, name) for name in ("counts", "sources", "written_bytes")})


def _resumed(work: Path) -> tuple[Tally, Digests]:
    """The state of the last checkpoint, the outputs cut back to it; a fresh one where there is none."""
    tally, digests = Tally(), Digests()
    parts = {part: work / f"{part}.jsonl" for part in PARTS}
    known = read_json(work / "state.json")
    if known and all(
        path.is_file() and path.stat().st_size >= known["written_bytes"][part] for part, path in parts.items()
    ):
        tally = Tally(Counter(known["counts"]), known["sources"], known["written_bytes"])
    for part, path in parts.items():
        with path.open("ab") as file:
            file.truncate(tally.written_bytes[part])
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                digests.add(_digest(json.loads(line)["text"]))
    return tally, digests
