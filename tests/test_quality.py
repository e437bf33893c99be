"""The quality classifier: its n-grams, its figures and its refusals, against naive and library computations."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from corpora.auc import auc, auc_interval, calibration, thresholds
from corpora.classifier import Classifier, load_classifier
from corpora.judged import is_held, judged, labels_of, side
from corpora.ngrams import Grams, features, kind, shortened
from corpora.quality import Settings, run
from foundation.dataio import write_jsonl
from foundation.errors import ArtifactError, InputError, StopRequested
from foundation.files import sha256_file
from foundation.report import Silent

GOOD_WORDS = ["кот", "дом", "лес", "идёт", "видит", "старый", "the", "cat", "runs", "home", "and", "sleeps"]
BAD_WORDS = ["КУПИТЬ", "цена!!!", "http", "скидка", "$$$", "click", "here", "BUY", "now"]


def documents(count: int, seed: int = 0, noise: float = 0.0) -> list[dict[str, object]]:
    """Judged documents, every second one good; of `noise` the label is drawn."""
    rng = random.Random(seed)
    made: list[dict[str, object]] = []
    for number in range(count):
        good = number % 2
        words = [rng.choice(GOOD_WORDS if good else BAD_WORDS) for _ in range(rng.randint(4, 12))]
        label = rng.randint(0, 1) if rng.random() < noise else good
        made.append({"text": " ".join(words) + f" {number}.", "label": label})
    return made


def judged_file(path: Path, rows: Iterable[dict[str, object]]) -> tuple[Path, ...]:
    write_jsonl(path, rows)
    return (path,)


def small(**changes: object) -> Settings:
    return Settings(**({"bits": 12, "min_judged": 50} | changes))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- n-grams


def naive_features(text: str, grams: Grams) -> dict[int, float]:
    """The definition, with Python's integers."""
    import re
    import unicodedata
    import zlib

    most = 2**64
    text = unicodedata.normalize("NFC", text)
    if len(text) > grams.max_characters:
        half = grams.max_characters // 2
        text = text[:half] + "\x1f" + text[-half:]
    found: set[int] = set()
    words = [zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.lower())]
    letters = [ord(c) for c in f"\x02{text}\x03"]
    shape = [ord(naive_kind(c)) for c in f"\x02{text}\x03"]
    parts = ((letters, grams.characters, 0), (words, grams.words, 64), (shape, grams.shapes, 128))
    for codes, longest, salt in parts:
        for length in range(1, longest + 1):
            for start in range(len(codes) - length + 1):
                run = 0
                for code in codes[start : start + length]:
                    run = (run * 0x9E3779B97F4A7C15 + code) % most
                run = (run + salt + length) % most
                run = (run ^ run >> 30) * 0xBF58476D1CE4E5B9 % most
                run = (run ^ run >> 27) * 0x94D049BB133111EB % most
                found.add((run ^ run >> 31) >> (64 - grams.bits))
    return {bucket: 1 / math.sqrt(len(found)) for bucket in found}


def naive_kind(character: str) -> str:
    """The code of a character in a shape, by another way than the table's."""
    import regex

    if ord(character) > 0xFFFF:
        return "\uffff"
    for expression, code in (
        (r"\p{Nd}", "0"), (r"\p{M}", "\u0301"), (r"[^\p{L}]", character), (r"[\x00-\u024f&&\p{Lu}]", "A"),
        (r"[\x00-\u024f]", "a"), (r"[\u0400-\u052f&&\p{Lu}]", "Я"), (r"[\u0400-\u052f]", "я"),
    ):  # fmt: skip
        if regex.fullmatch(expression, character, regex.V1):
            return code
    return "文"


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60),
    st.builds(
        Grams, characters=st.integers(1, 6), words=st.integers(0, 3), shapes=st.integers(0, 6),
        bits=st.integers(4, 26), max_characters=st.sampled_from([10, 4000]),
    ),
)  # fmt: skip
def test_features_are_their_definition(text: str, grams: Grams) -> None:
    buckets, values = features(text, grams)
    expected = naive_features(text, grams)
    assert buckets.tolist() == sorted(expected)
    assert values == pytest.approx([expected[bucket] for bucket in sorted(expected)], abs=1e-6)


def test_a_shape_forgets_the_letters_and_keeps_the_rest() -> None:
    assert "".join(map(chr, map(kind, "Ёж, 12 Cats\n文é"))) == "Яя, 00 Aaaa\n文a"

    def shape(text: str) -> set[int]:
        letters_alone = features(text, Grams(1, 0, 0, 20, 100))[0].tolist()
        return set(features(text, Grams(1, 0, 6, 20, 100))[0].tolist()) - set(letters_alone)

    whole = shape("кот спал.")
    assert shape("тот спел.") == whole
    assert len(shape("кот спал") - whole) == 5, "runs of 2 to 6 that end in a letter and the end"


def test_both_ends_of_a_long_text_are_seen() -> None:
    long = "начало" + "x" * 100 + "конец"
    assert shortened(long, 20) == "началоxxxx\x1fxxxxxконец"
    whole, cut = Grams(3, 0, 3, 16, 100), Grams(3, 0, 3, 16, 20)
    assert features("a" * 20 + ".", whole)[0].tolist() != features("a" * 20, whole)[0].tolist()
    ends = [set(features(long[:-1] + end, cut)[0].tolist()) for end in "ц."]
    assert ends[0] != ends[1]


# ----------------------------------------------------------------------------------------------- the figures


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({good for _, good in rows}) == 2
    )
)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    scores, good = np.array([s for s, _ in rows], dtype=np.float32), np.array([g for _, g in rows])
    pairs = [(a > b) + (a == b) / 2 for a in scores[good] for b in scores[~good]]
    assert auc(scores, good) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_the_interval_covers_the_true_auc() -> None:
    """Normal scores d apart have AUC = Phi(d / sqrt 2); 95 % of the intervals hold it, small samples too."""
    rng = np.random.default_rng(3)
    for true in (0.5, 0.8, 0.97):
        distance = math.sqrt(2) * _normal_quantile(true)
        for good, bad in ((15, 15), (20, 80)):
            labels = np.arange(good + bad) < good
            hits = 0
            for _ in range(400):
                scores = rng.normal(size=good + bad) + distance * labels
                found = auc_interval(auc(scores, labels), good, bad)
                hits += found.low <= true <= found.high
            assert hits / 400 > 0.92, (true, good, bad)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def test_a_perfect_order_of_few_documents_proves_little() -> None:
    few, many = auc_interval(1.0, 5, 5), auc_interval(1.0, 500, 500)
    assert few.high == many.high == 1.0
    assert 0.5 < few.low < 0.75 and 0.98 < many.low < 1
    wide = auc_interval(0.6, 10, 10)
    assert wide.low < 0.5 < 0.6 < wide.high
    mirrored = auc_interval(0.4, 10, 10)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - wide.high, 1 - wide.low), abs=1e-9)


def test_calibration_and_thresholds_by_hand() -> None:
    scores = np.array([0.05, 0.05, 0.95, 0.95], dtype=np.float32)
    good = np.array([False, True, True, True])
    error, bins = calibration(scores, good)
    assert [(row["documents"], row["good_share"]) for row in bins] == [(2, 0.5), (2, 1.0)]
    assert error == pytest.approx((2 * 0.45 + 2 * 0.05) / 4, abs=1e-6)
    row = next(row for row in thresholds(scores, good) if row["threshold"] == 0.5)
    assert row == {
        "threshold": 0.5,
        "kept_share": 0.5,
        "recall": pytest.approx(2 / 3, abs=1e-6),
        "precision": 1.0,
    }


# ------------------------------------------------------------------------------------------------- the stage


def test_a_trained_filter_scores_as_scikit_learn_would(tmp_path: Path) -> None:
    """The saved weights, read back, against a LogisticRegression on a matrix made in this test."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    paths = judged_file(tmp_path / "judged.jsonl", documents(300, noise=0.5))
    chosen = small(penalty=0.5)
    figures = run(chosen, {"judged": paths}, tmp_path, Silent())
    classifier = load_classifier(tmp_path / "quality")

    rows = list(judged(paths, None, chosen.seed))
    matrix = np.zeros((len(rows), 2**12))
    for number, row in enumerate(rows):
        for bucket, value in naive_features(row.text, chosen.grams).items():
            matrix[number, bucket] = value
    held = np.array([is_held(row.key, chosen.held_share) for row in rows])
    good = np.array([row.good for row in rows])
    model = LogisticRegression(C=2.0, tol=1e-8, max_iter=2000).fit(matrix[~held], good[~held])
    expected = model.predict_proba(matrix)[:, 1]
    assert classifier.scores([row.text for row in rows]) == pytest.approx(expected, abs=2e-3)
    assert figures["auc"] == pytest.approx(roc_auc_score(good[held], expected[held]), abs=0.01)
    assert 0.5 < figures["auc"] < 0.95 and figures["auc_low"] > 0.5
    assert figures["held"] == held.sum() and figures["trained"] == (~held).sum()


def test_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    from threadpoolctl import threadpool_limits

    paths = judged_file(tmp_path / "judged.jsonl", documents(120))
    for name, threads in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        with threadpool_limits(threads):
            run(small(bits=16), {"judged": paths}, tmp_path / name, Silent())
    for name in ("weights.safetensors", "quality.json"):
        one, two = (sha256_file(tmp_path / side / "quality" / name) for side in "ab")
        assert one == two
    facts = json.loads((tmp_path / "a" / "quality" / "quality.json").read_text())
    assert facts["figures"]["auc"] == 1.0 and len(facts["thresholds"]) == 19


def test_scores_with_a_border_are_labels(tmp_path: Path) -> None:
    rows = documents(120)
    labelled = judged_file(tmp_path / "labels.jsonl", rows)
    scored = judged_file(
        tmp_path / "scores.jsonl", ({"text": r["text"], "score": 3.5 if r["label"] else 3} for r in rows)
    )
    a = list(judged(labelled, None, 1))
    b = list(judged(scored, 3.5, 1))
    assert [(row.text, row.good) for row in a] == [(row.text, row.good) for row in b]
    with pytest.raises(InputError, match=r"all 120 judged documents are bad with good_from = 4.0"):
        run(small(good_from=4), {"judged": scored}, tmp_path, Silent())


def test_each_text_stands_on_one_side_once(tmp_path: Path) -> None:
    rows = documents(100)
    again = [row | {"text": f"  {row['text']}\n".replace(" ", "  ")} for row in rows[:40]]
    wrong = [rows[50] | {"label": 1 - int(str(rows[50]["label"]))}]
    paths = judged_file(tmp_path / "judged.jsonl", rows + again + wrong)
    labels = labels_of(paths, None, 5)
    assert (labels.read, labels.repeated, labels.contradictory) == (141, 41, 1)
    sides = [[row.text for row in side(paths, None, 5, labels, 0.3, held=held)] for held in (False, True)]
    texts = [str(row["text"]) for row in rows]
    assert sorted(sides[0] + sides[1]) == sorted(text for text in texts if text != texts[50])
    assert 15 < len(sides[1]) < 45
    other = judged_file(tmp_path / "other.jsonl", reversed(rows + again + wrong))
    turned = {row.key for row in side(other, None, 5, labels_of(other, None, 5), 0.3, held=True)}
    assert turned == {row.key for row in side(paths, None, 5, labels, 0.3, held=True)}


@pytest.mark.parametrize(
    "line, said",
    [
        ({"text": "a", "label": 2}, r"judged.jsonl, line 2: label 2; 0 \(bad\) or 1"),
        ({"text": "a", "label": True}, "line 2: label True"),
        ({"text": "a", "label": "good"}, "line 2: label 'good'"),
        ({"text": "a", "score": 1}, r"line 2: no label; the keys are \['score', 'text'\]"),
        ({"text": " ", "label": 1}, "line 2: no text under 'text'"),
        ({"story": "a", "label": 1}, r"line 2: no text under 'text'; the keys are \['label', 'story'\]"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: dict[str, object], said: str) -> None:
    paths = judged_file(tmp_path / "judged.jsonl", [{"text": "b", "label": 0}, line])
    with pytest.raises(InputError, match=said):
        list(judged(paths, None, 0))


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "judged.jsonl").write_text('{"text": "a", "score": NaN}\n')
    with pytest.raises(InputError, match="line 1: score nan; a finite number is needed"):
        list(judged([tmp_path / "judged.jsonl"], 0.5, 0))


def test_a_score_of_hundreds_of_digits_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "judged.jsonl").write_text(
        '{"text": "a", "score": 1}\n{"text": "b", "score": 1%s}\n' % ("0" * 400)
    )
    with pytest.raises(InputError, match=r"line 2: score 10{39}; a finite number is needed"):
        list(judged([tmp_path / "judged.jsonl"], 0.5, 0))


def test_a_held_share_that_leaves_too_few_to_train_is_named(tmp_path: Path) -> None:
    paths = judged_file(tmp_path / "judged.jsonl", documents(200))
    with pytest.raises(InputError, match=r"held_share = 0\.99 leaves \d of 200 judged documents") as caught:
        run(small(held_share=0.99), {"judged": paths}, tmp_path, Silent())
    assert "lower held_share" in caught.value.hint
    assert run(small(held_share=0.5), {"judged": paths}, tmp_path, Silent())["trained"] > 50


def test_what_can_not_be_learned_is_refused(tmp_path: Path) -> None:
    def refused(name: str, rows: list[dict[str, object]], said: str) -> None:
        with pytest.raises(InputError, match=said):
            run(small(), {"judged": judged_file(tmp_path / name, rows)}, tmp_path, Silent())
        assert not (tmp_path / "quality").exists()

    rows = documents(40)
    refused("few.jsonl", rows, r"20 good and 20 bad documents are too few .* to within 0\.\d\d")
    refused("one.jsonl", [row | {"label": 1} for row in rows], "all 40 judged documents are good: there is")
    lone = [row | {"label": int(number == 1)} for number, row in enumerate(documents(60))]
    refused("lone.jsonl", lone, r"1 good and 59 bad documents are too few")
    refused("noise.jsonl", documents(300, noise=1.0), r"can not tell good from bad.* AUC is 0\.\d+, 95 %")
    both = documents(100) + [row | {"label": 1 - int(str(row["label"]))} for row in documents(10)]
    refused("both.jsonl", both, r"10 of 100 texts are judged both .* such a one is .*both.jsonl, line 101")


def test_a_stop_leaves_no_classifier(tmp_path: Path) -> None:
    class Stopping(Silent):
        def stop_requested(self) -> bool:
            return True

    paths = judged_file(tmp_path / "judged.jsonl", documents(120))
    with pytest.raises(StopRequested):
        run(small(), {"judged": paths}, tmp_path, Stopping())
    assert not (tmp_path / "quality").exists()


def test_an_altered_classifier_is_refused(tmp_path: Path) -> None:
    grams = Grams(2, 1, 2, 10, 100)
    Classifier(grams, np.zeros(1024, dtype=np.float32), 0.5).save(tmp_path, {"figures": {}})
    assert load_classifier(tmp_path).scores(["что угодно"]) == pytest.approx([1 / (1 + math.exp(-0.5))])
    facts = json.loads((tmp_path / "quality.json").read_text())

    def refused(said: str) -> None:
        with pytest.raises(ArtifactError, match=said):
            load_classifier(tmp_path)

    (tmp_path / "quality.json").write_text(json.dumps(facts | {"format": 2}))
    refused("format 2, known here is 1")
    (tmp_path / "quality.json").write_text(json.dumps(facts | {"grams": facts["grams"] | {"bits": 11}}))
    refused(r"weights of shape \(1024,\), all finite, are needed: 2048")
    (tmp_path / "quality.json").write_text(json.dumps(facts | {"grams": {}}))
    refused("no quality classifier")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    refused("not the file that quality.json was written for")
    (tmp_path / "quality.json").unlink()
    refused("no quality.json that can be read")
    Classifier(grams, np.full(1024, np.nan, dtype=np.float32), 0.5).save(tmp_path, {})
    refused("all finite, are needed")
