"""What a quality filter trained on judged documents sees, and where it is blind.

Clean documents are stories of text/tinystories-ru; bad ones are other stories of it, damaged in one of seven
ways. A story is used once: clean or damaged, in training or in the test. The lines of boilerplate in the test
are not those of training. AUC of held-out documents, by damage:

    all           trained on all seven kinds of damage, equally many of each
    unseen        trained on the six others: a damage that the judges never met
    english       the Russian filter on paragraphs of text/grimm-en; and one that was trained on both
    articles      both filters on paragraphs of Wikipedia in eval/xquad, Russian and English: another domain
    documents     how many judged documents it takes
    penalty       the setting of that name

and the megabytes a second at which documents are scored, by one thread's own clock. Means over seeds of the
draw of documents and damages; the interval of a single AUC is that of corpora.auc. The settings' defaults
were chosen on seed 17, which is not among those measured.

    OMP_NUM_THREADS=1 python benchmarks/quality_filter.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from corpora.auc import auc, auc_interval  # noqa: E402
from corpora.classifier import Classifier, load_classifier  # noqa: E402
from corpora.quality import Settings, run  # noqa: E402
from foundation.dataio import documents, write_jsonl  # noqa: E402
from foundation.report import Silent  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "quality_filter.json"
TEST = 200  # clean documents, and damaged ones of each kind, in a test
SENTENCE = re.compile(r"(?<=[.!?…])\s+")
LINES = (
    "Главная | Каталог | Доставка | Контакты", "Подпишитесь на нашу рассылку и получите скидку 10%",
    "© 2019 Все права защищены. Копирование запрещено.", "Читайте также: 10 способов уснуть",
    "Войти через VK Facebook Google", "Ваш комментарий будет опубликован после проверки",
    "Home | About | Contact | Privacy policy", "Click here to subscribe to our newsletter!",
    "© 2021 All rights reserved.", "Related posts: 5 tips for better sleep",
    "Share on Facebook Share on Twitter", "This site uses cookies. Accept all",
    # From here on in tests alone.
    "Корзина (0) Избранное Сравнить товары", "Мы используем cookie. Продолжая, вы соглашаетесь",
    "Теги: дети, семья, досуг. Просмотров: 1532", "Скачать бесплатно без регистрации",
    "Sign up for free trial today", "Tags: kids, family, fun. Views: 1532",
)  # fmt: skip
TRAINING_LINES = 12


class Text:
    """Damages documents; `foreign` are sentences of another language, `lines` boilerplate."""

    def __init__(self, rng: random.Random, foreign: Sequence[str], lines: Sequence[str]) -> None:
        self.rng, self.foreign, self.lines = rng, foreign, lines

    def shuffled(self, text: str) -> str:
        """The words of each line in another order."""
        return "\n".join(" ".join(self.rng.sample(w, len(w))) for w in map(str.split, text.split("\n")))

    def boilerplate(self, text: str) -> str:
        """One line of a site's menu somewhere."""
        lines = text.split("\n")
        lines.insert(self.rng.randint(0, len(lines)), self.rng.choice(self.lines))
        return "\n".join(lines)

    def noisy(self, text: str) -> str:
        """Two letters in a hundred read wrongly, as a scanner does."""
        alike = dict(zip("оаеписнтлшщйьbeloinmgs", "0@сnлcпгпщшиъ6c10lrn95", strict=True))

        def read(c: str) -> str:
            wrong = c.isalpha() and self.rng.random() < 0.02
            return alike.get(c, self.rng.choice("~'|.")) if wrong else c

        return "".join(map(read, text))

    def truncated(self, text: str) -> str:
        """Ends in the middle of a sentence."""
        words = text.split(" ")
        cut = self.rng.randint(len(words) // 2, len(words) - 1)
        return " ".join(words[:cut]).rstrip(" .!?…\"»'\n")

    def mixed(self, text: str) -> str:
        """One sentence in four is of another language."""
        return self._sentences(text, lambda _: self.rng.choice(self.foreign))

    def miscoded(self, text: str) -> str:
        """One sentence in four was UTF-8, with typographic signs, and was read as cp1252."""
        signs = str.maketrans({"'": "’", '"': "”", " ": "\u00a0"})
        return self._sentences(text, lambda s: s.translate(signs).encode().decode("cp1252", "replace"))

    def repeated(self, text: str) -> str:
        """One sentence stands there four times."""
        sentences = SENTENCE.split(text)
        place = self.rng.randrange(len(sentences))
        return " ".join(sentences[:place] + [sentences[place]] * 3 + sentences[place:])

    def _sentences(self, text: str, change: Callable[[str], str]) -> str:
        """A quarter of the sentences changed, and at least one."""
        parts = SENTENCE.split(text)
        sure = self.rng.randrange(len(parts))
        changed = [change(s) if n == sure or self.rng.random() < 0.25 else s for n, s in enumerate(parts)]
        return " ".join(changed)


DAMAGES = ("shuffled", "boilerplate", "noisy", "truncated", "mixed", "miscoded", "repeated")


class Corpora:
    """Documents of one seed, each given out once."""

    def __init__(self, data: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.russian = [
            text for path in sorted((data / "text/tinystories-ru").glob("*.jsonl"))
            for text in documents([path], "story") if 300 < len(text) < 3000
        ]  # fmt: skip
        self.english = paragraphs(data / "text/grimm-en/GrimmsFairyTales.txt")
        self.articles = {name: contexts(data / f"eval/xquad/xquad.{name}.json") for name in ("ru", "en")}
        for texts in (self.russian, self.english, *self.articles.values()):
            self.rng.shuffle(texts)
        pairs = data / "text/tatoeba-en-ru"
        self.sentences = {
            language: (pairs / f"tatoeba.rus-eng.{name}").read_text(encoding="utf-8").splitlines()
            for language, name in (("en", "eng"), ("ru", "rus"))
        }

    def take(self, texts: list[str], count: int) -> list[str]:
        taken, texts[:] = texts[:count], texts[count:]
        assert len(taken) == count, f"{count} documents are asked for, {len(taken)} are left"
        return taken

    def damage(self, texts: Sequence[str], kind: str, language: str, *, test: bool) -> list[str]:
        lines = LINES[TRAINING_LINES:] if test else LINES[:TRAINING_LINES]
        hand = Text(self.rng, self.sentences["en" if language == "ru" else "ru"], lines)
        return [getattr(hand, kind)(text) for text in texts]

    def judged(self, texts: list[str], count: int, kinds: Sequence[str], language: str) -> list[dict[str, Any]]:
        """`count` judged documents, half of them damaged, equally many in each of `kinds`."""
        bad = [
            damaged for place, kind in enumerate(kinds)
            for damaged in self.damage(
                self.take(texts, len(range(place, count // 2, len(kinds)))), kind, language, test=False)
        ]  # fmt: skip
        good = self.take(texts, count - len(bad))
        return [{"text": t, "label": 1} for t in good] + [{"text": t, "label": 0} for t in bad]

    def test(self, texts: list[str], language: str, count: int = TEST) -> dict[str, list[str]]:
        """Clean documents, and others in each kind of damage."""
        damaged = {kind: self.damage(self.take(texts, count), kind, language, test=True) for kind in DAMAGES}
        return {"clean": self.take(texts, count)} | damaged


def paragraphs(path: Path) -> list[str]:
    """Runs of lines of a book, joined to 300 characters and more."""
    found, held = [], ""
    for text in documents([path]):
        held = f"{held}\n{' '.join(text.split())}".strip()
        if len(held) >= 300:
            found.append(held)
            held = ""
    return found


def contexts(path: Path) -> list[str]:
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


def train(rows: list[dict[str, Any]], seed: int, **changes: Any) -> tuple[Classifier, dict[str, Any]]:
    """A classifier and the figures of its stage."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_jsonl(out / "judged.jsonl", rows)
        figures = run(Settings(seed=seed, **changes), {"judged": (out / "judged.jsonl",)}, out, Silent())
        return load_classifier(out / "quality"), figures


def measured(classifier: Classifier, test: dict[str, list[str]]) -> dict[str, float]:
    """AUC of each damage against the clean documents, of all together, and the clean ones below 0.5."""
    scores = {kind: classifier.scores(texts) for kind, texts in test.items()}
    clean = scores.pop("clean")
    found = {kind: area(clean, bad) for kind, bad in scores.items()}
    return found | {
        "all kinds": area(clean, np.concatenate(list(scores.values()))),
        "clean rejected at 0.5": float((clean < 0.5).mean()),
    }


def area(clean: np.ndarray, bad: np.ndarray) -> float:
    return auc(np.concatenate([clean, bad]), np.arange(len(clean) + len(bad)) < len(clean))


def one_seed(data: Path, seed: int, count: int) -> dict[str, Any]:
    """All measurements on one draw of documents."""
    held = Corpora(data, seed)
    tests = {"russian": held.test(held.russian, "ru"), "english": held.test(held.english, "en", 40)}
    for name in ("ru", "en"):
        tests[f"articles_{name}"] = held.test(held.articles[name], name, 30)
    russian = held.judged(held.russian, count, DAMAGES, "ru")
    english = held.judged(held.english, 300, DAMAGES, "en")
    filter_ru, figures = train(russian, seed)
    both, _ = train(russian + english, seed)
    found: dict[str, Any] = {"stage": figures, "all": measured(filter_ru, tests["russian"])}
    print(seed, "all", found["all"], flush=True)
    found["english"] = {
        "russian filter": measured(filter_ru, tests["english"]),
        "filter of both": measured(both, tests["english"]),
        "filter of both, on Russian": measured(both, tests["russian"]),
    }
    found["articles"] = {
        f"{name}, {language}": measured(trained, tests[f"articles_{language}"])
        for name, trained in (("russian filter", filter_ru), ("filter of both", both))
        for language in ("ru", "en")
    }
    found["unseen"] = {}
    for kind in DAMAGES:
        others = [k for k in DAMAGES if k != kind]
        fresh = Corpora(data, seed)
        test = fresh.test(fresh.russian, "ru")  # the same stories as above
        blind, _ = train(fresh.judged(fresh.russian, count, others, "ru"), seed)
        found["unseen"][kind] = measured(blind, {"clean": test["clean"], kind: test[kind]})[kind]
        print(seed, "unseen", kind, round(found["unseen"][kind], 3), flush=True)
    many = russian + held.judged(held.russian, 4000 - count, DAMAGES, "ru")
    mixed = random.Random(seed).sample(many, len(many))
    found["documents"] = {}
    for size in (250, 500, 1000, 4000):
        part, _ = train(mixed[:size], seed, min_judged=100)
        found["documents"][str(size)] = measured(part, tests["russian"])["all kinds"]
    found["penalty"] = {}
    for penalty in (0.001, 0.01, 0.1):
        part, told = train(russian, seed, penalty=penalty)
        found["penalty"][str(penalty)] = {
            "auc": measured(part, tests["russian"])["all kinds"],
            "calibration_error": told["calibration_error"],
        }
    print(seed, {k: found[k] for k in ("documents", "penalty")}, flush=True)
    texts = [text for kind in tests["russian"].values() for text in kind]
    start = time.process_time()
    filter_ru.scores(texts)
    found["megabytes_per_second"] = sum(len(t.encode()) for t in texts) / 1e6 / (time.process_time() - start)
    return found


def summed(values: list[Any]) -> Any:
    """Numbers as their mean and standard deviation over seeds, in the shape that they came in."""
    if isinstance(values[0], dict):
        return {key: summed([value[key] for value in values]) for key in values[0]}
    return {"mean": round(mean(values), 4), "sd": round(stdev(values), 4) if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("SAMOVAR_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--seeds", type=int, nargs="+", default=[18, 19, 20])
    parser.add_argument("--documents", type=int, default=2000, help="judged documents of a filter")
    parser.add_argument("--result", type=Path, default=RESULT)
    chosen = parser.parse_args()
    found = []
    for number, seed in enumerate(chosen.seeds, start=1):
        found.append(one_seed(chosen.data, seed, chosen.documents))
        example = auc_interval(0.95, TEST, TEST)
        result = {
            "machine": {
                "python": platform.python_version(),
                "machine": platform.machine(),
                "cores": os.cpu_count(),
            },
            "seeds": chosen.seeds[:number],
            "judged_documents": chosen.documents,
            "test_documents_of_a_kind": TEST,
            "interval_of_a_single_auc_of_0.95": [round(example.low, 3), round(example.high, 3)],
            **summed(found),
        }
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        chosen.result.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
