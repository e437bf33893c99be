"""A quality filter of one's own: a small classifier trained on documents that were judged good or bad.

Logistic regression over hashed n-grams: small, on a CPU, as Vikhr's filter of 20k judged documents could be
(theirs is not published). What it learns is what the judges disliked, as far as that shows in the text's
surface; the held-out part says how far. Judge documents of the corpus that is to be filtered: in another domain
or language good documents score low too, and its probabilities hold only where as many are good as among the
judged ones. With keep_share (corpora.filter) the order alone counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from corpora.auc import auc, auc_interval, calibration, rounded, thresholds
from corpora.classifier import Classifier
from corpora.judged import Judged, Labels, is_held, labels_of, side
from corpora.ngrams import Grams, features
from foundation.errors import InputError
from foundation.files import writing
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many

if TYPE_CHECKING:
    import numpy as np

CHUNK_DOCUMENTS = 256
MOST_STEPS = 300  # of L-BFGS
LEAST_TRAINED = 0.25  # of min_judged


class Settings(StageSettings):
    """What makes a document good, and what is seen of it."""

    good_from: float | None = Field(
        None,
        allow_inf_nan=False,
        description="the score from which on a document is good; none: labels 0 and 1",
    )
    min_judged: int = Field(200, ge=20, description="fewer different judged texts are refused")
    held_share: float = Field(
        0.2, gt=0, lt=1, description="share held out to measure, by a hash of text and seed"
    )
    characters: int = Field(3, ge=1, le=8, description="longest n-gram of characters")
    words: int = Field(1, ge=0, le=4, description="longest n-gram of words; 0 = none")
    shapes: int = Field(
        6, ge=0, le=8, description="longest n-gram of the shape: letters as their script and case; 0 = none"
    )
    bits: int = Field(20, ge=10, le=26, description="2^bits buckets of n-grams; a bucket's weight is 4 bytes")
    max_characters: int = Field(
        4000, ge=100, description="of longer documents the first and last half of this are read"
    )
    penalty: float = Field(
        0.01, gt=0, le=1e6, description="of the squared weights, halved, beside the sum of all losses"
    )

    @property
    def grams(self) -> Grams:
        return Grams(self.characters, self.words, self.shapes, self.bits, self.max_characters)


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/quality from `judged`.

    Raises InputError when labels are missing, unknown or contradictory, there are too few documents or none of
    a class, or the classifier can not be told from chance on the held-out ones.
    """
    paths = many(inputs, "judged")
    labels = labels_of(paths, settings.good_from, settings.seed)
    if labels.contradictory:
        report.note(f"{labels.contradictory} texts are judged both good and bad; they are left out")
    held_good, held_bad = _check_counts(labels, settings)
    sides = {
        held: side(paths, settings.good_from, settings.seed, labels, settings.held_share, held=held)
        for held in (False, True)
    }
    total = len(labels.good)
    classifier = _fit(settings, sides[False], total, out / ".work", report)
    scores, good = _held_scores(classifier, sides[True], total - held_good - held_bad, total, report)
    area = auc_interval(auc(scores, good), held_good, held_bad)
    if area.low <= 0.5:
        raise InputError(
            f"the classifier can not tell good from bad: on {len(good)} held-out documents its AUC is "
            f"{area.mean:.3f}, 95 % interval {area.low:.3f} to {area.high:.3f}",
            hint="judge more documents, or by what shows in their text; AUC 0.5 is chance",
        )
    error, bins = calibration(scores, good)
    figures: Figures = {
        "read": labels.read,
        "repeated": labels.repeated,
        "contradictory": labels.contradictory,
        "trained": total - len(good),
        "held": len(good),
        "good_share": rounded(sum(labels.good.values()) / total),
        "auc": rounded(area.mean),
        "auc_low": rounded(area.low),
        "auc_high": rounded(area.high),
        "accuracy": rounded(((scores >= 0.5) == good).mean()),
        "held_good_share": rounded(good.mean()),
        "calibration_error": error,
    }
    tables = {"calibration": bins, "thresholds": thresholds(scores, good)}
    facts = {"settings": settings.model_dump(mode="json"), "figures": figures, **tables}
    classifier.save(out / "quality", facts)
    return figures


def _check_counts(labels: Labels, settings: Settings) -> tuple[int, int]:
    """Good and bad documents held out. Raises InputError where that is too few to train or to measure."""
    good, bad = (sum(label is wanted for label in labels.good.values()) for wanted in (True, False))
    if not good or not bad:
        only, score = ("bad", "lower") if bad else ("good", "raise")
        said = "" if settings.good_from is None else f" with good_from = {settings.good_from}"
        raise InputError(
            f"all {good + bad} judged documents are {only}{said}: there is nothing to tell apart",
            hint="judge documents of the other kind" + (f", or {score} good_from" if said else ""),
        )
    held = [label for key, label in labels.good.items() if is_held(key, settings.held_share)]
    held_good, held_bad = sum(held), len(held) - sum(held)
    trained = good + bad - len(held)
    if good + bad >= settings.min_judged and trained < LEAST_TRAINED * settings.min_judged:
        raise InputError(
            f"held_share = {settings.held_share} leaves {trained} of {good + bad} judged documents to train "
            f"on; needed are {LEAST_TRAINED:.0%} of min_judged = {settings.min_judged}",
            hint="lower held_share, or judge more documents",
        )
    if good + bad < settings.min_judged or not (0 < held_good < good and 0 < held_bad < bad):
        raise InputError(
            f"{good} good and {bad} bad documents are too few (min_judged = {settings.min_judged}): "
            f"{held_good} and {held_bad} of them are held out (held_share = {settings.held_share}), by "
            "which an AUC of 0.75 could be measured "
            + (f"to within {_half_width(held_good, held_bad):.2f}" if held_good and held_bad else "not at all"),
            hint="judge more documents; with 1,000 of each and held_share = 0.2 it is within 0.05",
        )
    return held_good, held_bad


def _half_width(good: int, bad: int) -> float:
    found = auc_interval(0.75, good, bad)
    return (found.high - found.low) / 2


def _fit(settings: Settings, documents: Iterable[Judged], total: int, work: Path, report: Report) -> Classifier:
    """Logistic regression by L-BFGS over a matrix that lies on disk; one thread, so that bits are the same."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    matrix, good = _matrix(settings.grams, documents, total, work, report)
    stop_if_asked(report)
    with threadpool_limits(1):
        model = LogisticRegression(C=1 / settings.penalty, max_iter=MOST_STEPS, tol=1e-4).fit(matrix, good)
    if (steps := int(model.n_iter_[0])) >= MOST_STEPS:
        report.note(f"the weights still moved after {steps} steps; a higher penalty settles them")
    weights = np.ascontiguousarray(model.coef_[0], dtype=np.float32)  # [2^bits]
    return Classifier(settings.grams, weights, float(model.intercept_[0]))


def _matrix(
    grams: Grams, documents: Iterable[Judged], total: int, work: Path, report: Report
) -> tuple[Any, Any]:
    """Features as a sparse matrix [N, 2^bits] mapped from two files in `work`, and labels bool [N]."""
    import numpy as np
    from scipy.sparse import csr_matrix

    work.mkdir(parents=True, exist_ok=True)
    ends, good = array("q", [0]), array("b")
    paths = work / "buckets.i32", work / "values.f32"
    with writing(work), paths[0].open("wb") as buckets_file, paths[1].open("wb") as values_file:
        for number, document in enumerate(documents, start=1):
            buckets, values = features(document.text, grams)
            buckets_file.write(buckets.tobytes())
            values_file.write(values.tobytes())
            ends.append(ends[-1] + len(buckets))
            good.append(document.good)
            if number % CHUNK_DOCUMENTS == 0:
                stop_if_asked(report)
                report.progress(number, total, "document")
    buckets, values = (
        np.memmap(path, dtype=dtype, mode="r")
        for path, dtype in zip(paths, (np.int32, np.float32), strict=True)
    )
    shape = (len(good), 1 << grams.bits)
    matrix = csr_matrix((values, buckets, np.asarray(ends)), shape=shape, copy=False)
    return matrix, np.asarray(good, dtype=bool)


def _held_scores(
    classifier: Classifier, documents: Iterable[Judged], trained: int, total: int, report: Report
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [N] and labels bool [N] of the held-out documents, by the code that a filter runs."""
    import numpy as np

    scores, good = array("f"), array("b")
    for number, document in enumerate(documents, start=1):
        scores.extend(classifier.scores([document.text]))
        good.append(document.good)
        if number % CHUNK_DOCUMENTS == 0:
            stop_if_asked(report)
            report.progress(trained + number, total, "document")
    report.progress(total, total, "document")
    return np.asarray(scores), np.asarray(good, dtype=bool)
