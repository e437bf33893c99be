"""Deduplication against plain answers: sets of strings, all pairs, and the library's own signatures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reports import StopsAfter

from corpora import minhash, repeats, signatures
from corpora.deduplicate import Settings, run
from corpora.paragraphs import character_classes, folded, split, without
from corpora.signatures import Sketch
from foundation.dataio import documents, write_jsonl
from foundation.errors import InputError, StopRequested
from foundation.report import Silent

CLASSES = np.frombuffer(character_classes(), np.uint8)
SENTENCES = (
    "самовар чайник заварка вечером мы пили чай на веранде а потом смотрели на звёзды и молчали "
    "the pilot checked every instrument before the flight while the engineer signed the journal"
)
WORDS = SENTENCES.split()
ALL_LONG = {"exact_characters": 1, "near_characters": 20}


@pytest.fixture(autouse=True, scope="module")
def _hasty_disk() -> Iterator[None]:
    """An fsync takes milliseconds, and a run has forty. The processes that are killed do without this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def normal(text: str) -> str:
    """The squeezed form, the plain way."""
    once = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = [character for character in once if unicodedata.category(character) != "Cf"]
    return " ".join("".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in visible).split())


def runs(text: str, length: int) -> set[str]:
    form = normal(text)
    return {form[start : start + length] for start in range(len(form) - length + 1)}


def share(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def squeezed(*texts: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, starts, ends) as the stage has them."""
    forms = [folded(text) for text in texts]
    codes = np.frombuffer("".join(forms).encode("utf-32-le"), np.uint32)
    codes, ends, _ = minhash.squeeze(codes, np.cumsum([len(form) for form in forms]), CLASSES)
    return codes, np.concatenate([[0], ends[:-1]]), ends


def prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", "ами", "ing", "ого"]) for _ in range(words))


def edited(text: str, rng: random.Random, edits: int) -> str:
    words = text.split()
    for _ in range(edits):
        words[rng.randrange(len(words))] = prose(rng, 1)
    return " ".join(words)


def deduplicated(folder: Path, texts: Sequence[str], **chosen: Any) -> tuple[list[str], dict[str, Any]]:
    """(documents left, figures)"""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", ({"text": text} for text in texts))
    figures = run(Settings(**chosen), {"corpus": (folder / "corpus.jsonl",)}, out, Silent())
    return [json.loads(line)["text"] for line in (out / "text.jsonl").open(encoding="utf-8")], figures


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "removed.jsonl").open(encoding="utf-8")]


# ------------------------------------------------------------------------------------------- signatures


@hypothesis_settings(deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_the_squeezed_form_is_the_plain_one(texts: list[str]) -> None:
    forms = [folded(text) for text in texts]
    codes = np.frombuffer("".join(forms).encode("utf-32-le"), np.uint32)
    codes, ends, utf8_bytes = minhash.squeeze(codes, np.cumsum([len(form) for form in forms]), CLASSES)
    parts = np.split(codes, ends[:-1])
    assert [part.tobytes().decode("utf-32-le") for part in parts] == [normal(text) for text in texts]
    assert utf8_bytes.tolist() == [len(normal(text).encode()) for text in texts]


def test_signatures_are_datasketchs() -> None:
    from datasketch import MinHash, MinHashLSH

    sketch = Sketch.of(Settings(seed=23))
    rng = random.Random(1)
    texts = [prose(rng, 5 + n) for n in range(20)]
    codes, starts, ends = squeezed(*texts)
    ours = minhash.signatures(codes, starts, ends, sketch.shingle, sketch.a, sketch.b)
    for n in range(len(texts)):
        theirs = MinHash(128, seed=23, hashfunc=lambda value: int(value) >> 32)
        theirs.update_batch(minhash.shingles(codes[starts[n] : ends[n]], sketch.shingle))
        assert np.array_equal(ours[n], theirs.hashvalues)
    chosen = MinHashLSH(0.8, 128, weights=(0.1, 0.9))
    assert (sketch.bands, sketch.rows) == (chosen.b, chosen.r) == (14, 9)


def test_a_band_key_is_equal_where_the_band_is() -> None:
    sketch = Sketch.of(Settings())
    rng = random.Random(2)
    texts = [prose(rng, 30)]
    texts += [edited(texts[0], rng, n % 8) for n in range(60)]
    arguments = (*squeezed(*texts), sketch.shingle, sketch.a, sketch.b)
    keys = minhash.band_keys(*arguments, sketch.bands, sketch.rows)
    signed = minhash.signatures(*arguments)
    for band in range(sketch.bands):
        rows = signed[:, band * sketch.rows : (band + 1) * sketch.rows]
        same_rows = (rows[:, None] == rows[None]).all(2)
        assert np.array_equal(keys[band][:, None] == keys[band][None], same_rows)
    assert 0.05 < (keys[:, 1:] == keys[:, :1]).mean() < 0.95


@hypothesis_settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12))
def test_jaccard_is_that_of_the_sets_of_strings(seed: int, edits: int) -> None:
    rng = random.Random(seed)
    one = prose(rng, rng.randint(8, 40))
    other = edited(one, rng, edits)
    codes, starts, ends = squeezed(one, other)
    first, second = (minhash.shingles(codes[s:e], 5) for s, e in zip(starts, ends, strict=True))
    assert len(first) == len(runs(one, 5))
    assert minhash.jaccard(first, second) == share(runs(one, 5), runs(other, 5))


def test_estimates_are_unbiased_and_spread_as_the_law_says() -> None:
    """K values agree in Binomial(K, J) places: the mean error over many pairs, and its variance, follow."""
    sketch = Sketch.of(Settings(seed=5))
    rng = random.Random(3)
    pairs = [(text, edited(text, rng, n % 10)) for n, text in enumerate(prose(rng, 40) for _ in range(600))]
    codes, starts, ends = squeezed(*(text for pair in pairs for text in pair))
    signed = minhash.signatures(codes, starts, ends, 5, sketch.a, sketch.b)
    estimates = (signed[0::2] == signed[1::2]).mean(1)
    exact = np.array([share(runs(one, 5), runs(other, 5)) for one, other in pairs])
    variance = exact * (1 - exact) / 128
    some = variance > 0
    assert some.sum() > 400 and np.array_equal(estimates[~some], exact[~some])
    z = (estimates - exact)[some] / np.sqrt(variance[some])
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert 0.8 < (z**2).mean() < 1.2
    assert 0.3 < exact.min() < 0.6 < 0.9 < exact.max()


# -------------------------------------------------------------------------------------------- decisions


def greedy(texts: Sequence[str], similarity: float, shared: Any) -> list[int | None]:
    """For each text the first kept one before it that is `shared` and reaches `similarity`, or None."""
    sets = [runs(text, 5) for text in texts]
    like: list[int | None] = []
    for n, mine in enumerate(sets):
        hits = (o for o in range(n) if like[o] is None and shared(o, n) and share(mine, sets[o]) >= similarity)
        like.append(next(hits, None))
    return like


@hypothesis_settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), similarity=st.sampled_from([0.6, 0.8, 0.9]), words=st.integers(12, 40))
def test_decisions_are_those_of_comparing_all_pairs_that_share_a_band(
    tmp_path_factory: pytest.TempPathFactory, seed: int, similarity: float, words: int
) -> None:
    """Chains and families of edits: kept and removed exactly as comparing everything would decide."""
    from datasketch import MinHash

    rng = random.Random(seed)
    texts = [prose(rng, words) for _ in range(8)]
    for _ in range(60):
        texts.append(edited(rng.choice(texts), rng, rng.randint(0, 4)))
    chosen = Settings(similarity=similarity, seed=seed % 1000, **ALL_LONG)
    sketch = Sketch.of(chosen)
    codes, starts, ends = squeezed(*texts)
    signed = []
    for start, end in zip(starts, ends, strict=True):
        theirs = MinHash(128, seed=chosen.seed, hashfunc=lambda value: int(value) >> 32)
        theirs.update_batch(minhash.shingles(codes[start:end], 5))
        signed.append(theirs.hashvalues[: sketch.bands * sketch.rows].reshape(sketch.bands, -1))

    def shared(one: int, other: int) -> bool:
        same = normal(texts[one]) == normal(texts[other])
        return same or bool((signed[one] == signed[other]).all(1).any())

    expected = greedy(texts, similarity, shared)
    folder = tmp_path_factory.mktemp("pairs")
    left, figures = deduplicated(folder, texts, similarity=similarity, seed=seed % 1000, **ALL_LONG)
    assert left == [text for text, like in zip(texts, expected, strict=True) if like is None]
    assert figures["exact_repeats"] == len(texts) - len({normal(text) for text in texts})
    for row in told(folder):
        mine, other = (runs(texts[at["document"] - 1], 5) for at in (row, row["like"]))
        assert expected[row["like"]["document"] - 1] is None  # what it is like was kept
        assert row["like"]["document"] < row["document"]
        assert row["similarity"] == pytest.approx(share(mine, other), abs=1e-4)
        assert share(mine, other) >= similarity


def test_nearly_all_that_a_plain_comparison_finds_is_found(tmp_path: Path) -> None:
    """Against all pairs without bands: what differs are the few pairs close to the threshold."""
    rng = random.Random(8)
    texts = [prose(rng, 30) for _ in range(120)]
    texts += [edited(rng.choice(texts[:120]), rng, rng.randint(1, 4)) for _ in range(240)]
    expected = greedy(texts, 0.8, lambda one, other: True)
    left, _ = deduplicated(tmp_path, texts, **ALL_LONG)
    wrong = set(left) ^ {text for text, like in zip(texts, expected, strict=True) if like is None}
    gone = sum(like is not None for like in expected)
    assert gone > 100 and len(wrong) < 0.06 * gone


@hypothesis_settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), unit=st.sampled_from(["line", "block", "document"]))
def test_exact_repeats_go_and_the_output_has_nothing_left_to_remove(
    tmp_path_factory: pytest.TempPathFactory, seed: int, unit: str
) -> None:
    rng = random.Random(seed)
    pool = [prose(rng, rng.randint(1, 20)) for _ in range(12)]
    breaks = ["\n", "\n\n", "\n \n", "\n\n\n"]

    def document() -> str:
        parts = [edited(rng.choice(pool), rng, rng.choice([0, 0, 1])) for _ in range(rng.randint(1, 5))]
        return "".join(part + rng.choice(breaks) for part in parts)

    folder = tmp_path_factory.mktemp("again")
    chosen: dict[str, Any] = {"unit": unit, "exact_characters": 10, "near_characters": 30}
    left, figures = deduplicated(folder, [document() for _ in range(30)], **chosen)
    forms = [normal(piece) for text in left for piece in split(text, unit)]  # type: ignore[arg-type]
    long = [form for form in forms if len(form) >= 10]
    assert len(long) == len(set(long))
    again, second = deduplicated(folder, left, **chosen)
    assert again == left and second["exact_repeats"] == second["near_repeats"] == 0
    assert second["kept_bytes"] == figures["kept_bytes"] == sum(len(text.encode()) for text in left)


def test_what_a_repeat_of_a_removed_first_is_like(tmp_path: Path) -> None:
    """b is nearly a, and goes; an exact copy of b is then told to be like a, which stays."""
    a = "самовар стоял на столе у окна и тихо шумел весь длинный зимний вечер пока мы читали"
    b = a.replace("читали", "писали")
    left, figures = deduplicated(tmp_path, [a, b, f"- {b.upper()}!"], **ALL_LONG)
    assert left == [a]
    assert (figures["exact_repeats"], figures["near_repeats"]) == (1, 1)
    nearness = pytest.approx(share(runs(a, 5), runs(b, 5)), abs=1e-4)
    like = {"document": 1, "paragraph": 1, "text": a}
    assert told(tmp_path) == [
        {"document": 2, "paragraph": 1, "text": b, "similarity": nearness, "like": like},
        {"document": 3, "paragraph": 1, "text": f"- {b.upper()}!", "similarity": nearness, "like": like},
    ]


def test_forms_of_one_text_are_one(tmp_path: Path) -> None:
    one = "Ёжик №5 нашёл ﬁnal café, и сказал: «Привет!»"
    forms = [
        unicodedata.normalize("NFD", one),
        one.upper(),
        one.replace(" ", "\u00a0\t"),
        one.replace(",", " —").replace("«", '"').replace("»", '"'),
        one.replace("нашёл", "на\u00adшёл"),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in one),
    ]
    other = one.replace("5", "6")  # a digit is said, not form
    left, figures = deduplicated(tmp_path, [one, *forms, other], similarity=1.0, exact_characters=20)
    assert left == [one, other] and figures["exact_repeats"] == len(forms)


def test_documents_keep_their_shape_and_lose_what_was_said(tmp_path: Path) -> None:
    menu = "Главная страница, новости, контакты"
    texts = [
        f"{menu}\n\nПервый рассказ о самоваре и чайнике.\n* * *\nКонец первого рассказа о чайнике.\n",
        f"{menu}\n\nВторой рассказ, совсем про другое дело.\n\n{menu}\n- Да.\n\n",
        f"{menu}\n* * *\n{menu.upper()}",
        "- Да.\n- Да.",
    ]
    left, figures = deduplicated(tmp_path, texts, exact_characters=20)
    assert left == [texts[0], "Второй рассказ, совсем про другое дело.\n\n- Да.", "- Да.\n- Да."]
    assert (figures["documents"], figures["kept_documents"], figures["exact_repeats"]) == (4, 3, 4)
    places = [(row["document"], row["paragraph"], row["like"]["paragraph"]) for row in told(tmp_path)]
    assert places == [(2, 1, 1), (2, 3, 1), (3, 1, 1), (3, 3, 1)]


def test_short_lines_do_not_outlive_their_document(tmp_path: Path) -> None:
    tale = "Первый рассказ о самоваре и чайнике, как его слышали все."
    poem = "Тише, мыши,\nКот на крыше,\nА котята\nЕщё выше."
    texts = [
        f"{tale}\n- Да!\n- Нет.",
        f"{tale}\n- Да!\n- Нет.",  # a scrap: more goes than stays
        f"{tale}\n{poem}\n{poem[::-1]}",  # more stays than goes
        f"{tale}\n- Да!\nА это другой рассказ, длинный и нигде больше не сказанный.",  # something long stays
    ]
    left, figures = deduplicated(tmp_path, texts, exact_characters=40)
    assert left == [texts[0], *(text.removeprefix(f"{tale}\n") for text in texts[2:])]
    assert figures["scraps"] == 1 and figures["kept_documents"] == 3


def test_blocks_are_what_empty_lines_divide() -> None:
    wrapped = "first line\nsecond line\n \n\n  indented\n\nlast"
    assert split(wrapped, "block") == ["first line\nsecond line", "  indented", "last"]
    assert without(split(wrapped, "block"), {1}, "block") == "first line\nsecond line\n\nlast"
    assert without(split("a\n\nb\n\nc", "line"), {0}, "line") == "b\n\nc"
    assert without(split("a\n\nb\n\nc", "line"), {2, 4}, "line") == "a"


def test_a_sample_of_what_goes_is_told(tmp_path: Path) -> None:
    text = "одна и та же довольно длинная строка повторяется"
    _, figures = deduplicated(tmp_path, [text] * 50, listed=7)
    assert figures["exact_repeats"] == 49
    places = [row["document"] for row in told(tmp_path)]
    assert len(places) == 7 and places == sorted(set(places)) and places[0] > 1
    deduplicated(tmp_path, [text] * 50, listed=0)
    assert told(tmp_path) == []


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 40), st.integers(0, 2**32))
def test_equal_keys_are_found_in_parts(values: list[int], part: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.random(len(values)) < 0.8
    keys = np.array(values, np.uint64).reshape(-1, 1).repeat(2, axis=1) * np.array([1, 5], np.uint64)
    cuts = np.sort(rng.integers(0, len(values) + 1, 3))
    expected = {}
    for n, value in enumerate(values):
        if wanted[n] and (before := [o for o in range(n) if wanted[o] and values[o] == value]):
            expected[n] = (before[-1], before[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "PART", part)
        groups = list(repeats.equal_keys(lambda: iter(np.split(keys, cuts)), wanted, Silent()))
    found = {n: (b, f) for group in groups for n, b, f in zip(*(a.tolist() for a in group), strict=True)}
    assert found == expected


# --------------------------------------------------------------------------------- stopping and refusing


def corpus(folder: Path) -> Path:
    rng = random.Random(11)
    pool = [prose(rng, 25) for _ in range(40)]
    texts = ["\n".join(edited(rng.choice(pool), rng, rng.randint(0, 3)) for _ in range(4)) for _ in range(120)]
    write_jsonl(folder / "corpus.jsonl", ({"text": text} for text in texts))
    return folder / "corpus.jsonl"


def digests(out: Path) -> list[str]:
    names = ("text.jsonl", "removed.jsonl")
    return [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names]


def small(patch: pytest.MonkeyPatch) -> None:
    """Many blocks, parts and chunks."""
    patch.setattr(signatures, "BLOCK_CHARACTERS", 6000)
    patch.setattr(repeats, "PART", 300)
    patch.setattr(repeats, "CHUNK", 40)


def test_stopped_and_resumed_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop at every one of the places where it can; once more in between, a block half written by a kill."""
    path = corpus(tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    figures = run(Settings(), {"corpus": (path,)}, whole, Silent())
    small(monkeypatch)
    broken, stops = tmp_path / "broken", 0
    broken.mkdir()
    while True:
        try:
            assert run(Settings(), {"corpus": (path,)}, broken, StopsAfter(2)) == figures
            break
        except StopRequested:
            stops += 1
            if not (broken / ".work" / "signed.json").is_file():
                with (broken / ".work" / "text").open("ab") as file:
                    file.write(b"half a block")
                (broken / ".work" / ".rows-000099.npz.7.tmp").write_bytes(b"half a block")
    assert stops > 15
    assert digests(broken) == digests(whole)
    assert figures["near_repeats"] > 50 and figures["exact_repeats"] > 20


def test_finished_passes_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus(tmp_path)
    run(Settings(), {"corpus": (path,)}, tmp_path, Silent())
    first = digests(tmp_path)

    def never(*arguments: object) -> None:
        raise AssertionError("done again")

    for module, name in ((signatures, "_block"), (repeats, "equal_keys"), (repeats, "_alike")):
        monkeypatch.setattr(module, name, never)
    run(Settings(), {"corpus": (path,)}, tmp_path, Silent())
    assert digests(tmp_path) == first


KILLED = """
import os, sys
from pathlib import Path
from corpora import deduplicate, repeats, signatures
from foundation import files
from foundation.report import Silent
corpus, out, left = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
signatures.BLOCK_CHARACTERS, repeats.PART, repeats.CHUNK, deduplicate.BETWEEN_LOOKS = 6000, 100, 40, 50
def killing(path, data, **more):
    global left
    left -= 1
    if left == 0:
        path.with_name(f".{path.name}.7.tmp").write_bytes(data[:9])
        os.kill(os.getpid(), 9)
    files.write_atomic(path, data, **more)
signatures.write_atomic = repeats.write_atomic = killing
class Killed(Silent):
    def progress(self, done, total, unit="step", **figures):
        if unit == "document written" and not (out.parent / "written").exists():
            (out.parent / "written").touch()
            os.kill(os.getpid(), 9)
deduplicate.run(deduplicate.Settings(), {"corpus": (corpus,)}, out, Killed())
"""


@pytest.mark.slow
def test_killed_and_resumed_is_the_same(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    """At every thirteenth file that is written, and in the last pass."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run(Settings(), {"corpus": (path,)}, whole, Silent())
    codes: list[int] = []
    while not codes or codes[-1]:
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(killed), "13"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=120,
        )
        codes.append(ended.returncode)
        assert ended.returncode in (0, -signal.SIGKILL) and len(codes) < 12
    assert len(codes) > 3
    assert digests(killed) == digests(whole)


def test_the_same_from_one_file_or_several(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    texts = list(documents([path]))
    parts = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    write_jsonl(parts[0], ({"text": text} for text in texts[:50]))
    write_jsonl(parts[1], ({"text": text} for text in texts[50:]))
    for name, paths in (("one", (path,)), ("two", parts)):
        (tmp_path / name).mkdir()
        run(Settings(), {"corpus": paths}, tmp_path / name, Silent())
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_nothing_long_enough_leaves_the_corpus_as_it_is(tmp_path: Path) -> None:
    texts = ["- Да.", "- Да.", "* * *"]
    left, figures = deduplicated(tmp_path, texts)
    assert left == texts and figures["kept_share"] == 1


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for paths, said in (((tmp_path / "empty.txt",), "holds no document"), ((), "the corpus holds no document")):
        with pytest.raises(InputError, match=said):
            run(Settings(), {"corpus": paths}, tmp_path, Silent())
    for odd in ({"similarity": 0.3}, {"similarity": 1.1}, {"permutations": 8}, {"unit": "page"},
                {"shingle_characters": 12}, {"near_characters": 5}, {"words": 3}):  # fmt: skip
        with pytest.raises(ValidationError):
            Settings(**odd)
    with pytest.raises(ValidationError, match="near_characters = 60 must be at least exact_characters = 80"):
        Settings(exact_characters=80)


def test_a_similarity_that_no_bands_can_tell_from_one_is_refused() -> None:
    """What passes is what datasketch has bands for; what does not, nearly all that it has none for."""
    from datasketch import MinHashLSH

    for permutations in (32, 48, 64, 128):
        passed = []
        for thousandths in range(950, 1000):
            try:
                chosen = Settings(similarity=thousandths / 1000, permutations=permutations)
            except ValidationError as error:
                [most] = re.findall(r"at most (0\.\d+) can", str(error))
                Settings(similarity=float(most), permutations=permutations)
                assert thousandths / 1000 > float(most)
            else:
                assert Sketch.of(chosen).bands >= 2
                passed.append(chosen.similarity)
        with pytest.raises(ValueError, match="bands"):
            MinHashLSH(max(passed) + 0.005, permutations, weights=signatures.MISSES)
    assert Sketch.of(Settings(similarity=1, permutations=32)).bands == 0
