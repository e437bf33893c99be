"""Tasks against transformers' own logits and generation, hand-worked ROUGE-L, and files that are none."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from corpora.world.pairs import answer_of, question
from corpora.world.profiles import every_profile
from evaluation.tasks import load_tasks, measure, read
from evaluation.tasks.choices import Choices
from evaluation.tasks.copying import Copying
from evaluation.tasks.generation import Generation
from evaluation.tasks.load import read_lines
from evaluation.tasks.perplexity import Perplexity
from evaluation.tasks.programmes import Programmes
from evaluation.tasks.prompts import Writer, row
from evaluation.tasks.rouge import common_words, rouge_l, words
from foundation.chat import IGNORED
from foundation.dataio import write_jsonl
from foundation.errors import InputError, ModelError, StopRequested
from foundation.model import load
from foundation.report import Silent
from foundation.task import AnsweredTask, Reading, ReadTask
from foundation.tokenizer import Tokenizer

USER = [{"role": "user", "content": "What does the squat train?"}]
TURNS = [*USER, {"role": "assistant", "content": "the legs"}, {"role": "user", "content": "And the plank?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """Weights five times as large: a random model that has opinions."""
    model = load(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim == 2 else 1)
    return model


@pytest.fixture(scope="module")
def exact(model: Any) -> Any:
    """The same model in float64."""
    from copy import deepcopy

    return deepcopy(model).double()


def written(tmp_path: Path, records: list[dict[str, Any]], name: str = "task") -> Path:
    path = tmp_path / f"{name}.jsonl"
    write_jsonl(path, records)
    return path


def loaded(path: Path, folder: Path, max_tokens: int = 256, max_items: int = 100) -> Any:
    return load_tasks([path], Tokenizer(folder), Silent(), max_tokens=max_tokens, max_items=max_items)[0]


def log_p(exact: Any, ids: list[int], start: int) -> float:
    """log p of ids[start:] after ids[:start], token by token from transformers' logits in float64."""
    with torch.no_grad():
        logs = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(start, len(ids)))


def test_choices_by_transformers_own_logits(model: Any, exact: Any, folder: Path, tmp_path: Path) -> None:
    """Plain prompts, ids put together by hand; scores and both accuracies from float64 logits."""
    tokenizer = Tokenizer(folder)
    choices = [
        [" the legs.", " the arms and the core of the pilot", " нет"],
        [" legs", " Пилот делает приседания"],
    ]
    prompts = ["The squat trains", "Экипаж отдыхает"]
    records = [{"prompt": p, "choices": c, "answer": 1} for p, c in zip(prompts, choices, strict=True)]
    shares, right, right_bytes = [], [], []
    for prompt, texts in zip(prompts, choices, strict=True):
        before = [tokenizer.boundary_id, *tokenizer.encode(prompt)]
        logs = [log_p(exact, [*before, *tokenizer.encode(text)], len(before)) for text in texts]
        shares.append(math.exp(logs[1]) / sum(map(math.exp, logs)))
        right.append(logs[1] == max(logs))
        by_byte = [value / len(text.encode()) for value, text in zip(logs, texts, strict=True)]
        right_bytes.append(by_byte[1] == max(by_byte))
    found = measure(
        model, [loaded(written(tmp_path, records), folder)], tokenizer.pad_id, Silent(), batch_rows=2
    )[0]
    assert found.name == "task"
    np.testing.assert_allclose(found.scores, shares, rtol=2e-4)
    assert found.figures["accuracy"] == pytest.approx(np.mean(right))
    assert found.figures["accuracy_bytes"] == pytest.approx(np.mean(right_bytes))
    assert found.figures["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_choices_in_a_chat_count_the_last_turn_and_its_end(
    model: Any, exact: Any, folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(folder)
    prompt = (
        "<|im_start|>user\nWhat does the squat train?<|im_end|>\n<|im_start|>assistant\nthe legs<|im_end|>\n"
        "<|im_start|>user\nAnd the plank?<|im_end|>\n<|im_start|>assistant\n"
    )
    before = tokenizer.encode_marked(prompt)
    texts = ["the core", "the core of the pilot"]
    logs = [
        log_p(exact, [*before, *tokenizer.encode(text), tokenizer.id_of("<|im_end|>")], len(before))
        for text in texts
    ]
    task = loaded(written(tmp_path, [{"messages": TURNS, "choices": texts, "answer": 0}]), folder)
    found = measure(model, [task], tokenizer.pad_id, Silent())[0]
    assert found.scores[0] == pytest.approx(1 / (1 + math.exp(logs[1] - logs[0])), rel=2e-4)
    for made in task.rows:  # an earlier answer would cancel in the shares, but not in accuracy_bytes
        assert (made["labels"][: len(before)] == IGNORED).all() and made["labels"][len(before)] != IGNORED


def test_accuracy_and_shares_by_hand() -> None:
    """Two items; log p -1, -2, -3 and -4, -2; by byte (2, 8, 4 and 8, 2 bytes) the other choice wins."""
    readings = [
        Reading(np.array(nll), np.array([True]), np.empty(0)) for nll in ([1], [0.5, 1.5], [3], [4], [2])
    ]
    task = Choices("x", rows=[], sizes=[3, 2], gold=[0, 0], lengths_bytes=[2, 8, 4, 8, 2])
    e = math.e
    expected = [e**-1 / (e**-1 + e**-2 + e**-3), e**-4 / (e**-4 + e**-2)]
    np.testing.assert_allclose(task.scores(readings), expected, rtol=1e-12)
    assert task.figures(readings) == pytest.approx({"accuracy": 0.5, "accuracy_bytes": 0.5, "chance": 5 / 12})
    flipped = Choices("x", rows=[], sizes=[3, 2], gold=[1, 0], lengths_bytes=[2, 8, 4, 8, 2])
    assert flipped.figures(readings)["accuracy_bytes"] == 1.0
    assert flipped.figures(readings)["accuracy"] == 0.0


def test_shares_of_texts_too_unlikely_for_a_float() -> None:
    readings = [Reading(np.array([nll]), np.array([True]), np.empty(0)) for nll in (5000.0, 5001.0)]
    task = Choices("x", rows=[], sizes=[2], gold=[0], lengths_bytes=[1, 1])
    assert task.scores(readings)[0] == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("form", ["text", "messages"])
def test_perplexity_by_transformers_own_logits(
    form: str, model: Any, exact: Any, folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(folder)
    texts = ["The crew rests.", "Пилот делает планку, экипаж отдыхает."]
    if form == "text":
        records = [{"text": text} for text in texts]
        before = [tokenizer.boundary_id]
        after = [tokenizer.encode(text) for text in texts]
    else:
        records = [{"messages": [*USER, {"role": "assistant", "content": text}]} for text in texts]
        before = tokenizer.encode_marked(
            "<|im_start|>user\nWhat does the squat train?<|im_end|>\n<|im_start|>assistant\n"
        )
        after = [[*tokenizer.encode(text), tokenizer.id_of("<|im_end|>")] for text in texts]
    logs = [log_p(exact, [*before, *ids], len(before)) for ids in after]
    found = measure(model, [loaded(written(tmp_path, records), folder)], tokenizer.pad_id, Silent())[0]
    np.testing.assert_allclose(
        found.scores, [math.exp(log / len(ids)) for log, ids in zip(logs, after, strict=True)], rtol=2e-4
    )
    mean = -sum(logs) / sum(map(len, after))
    assert found.figures == pytest.approx({"perplexity": math.exp(mean), "nats_per_token": mean}, rel=2e-4)


def test_long_texts_are_read_in_windows_and_stay_one_item(folder: Path, tmp_path: Path) -> None:
    """Of a model that thinks all 400 tokens equally likely, whatever the windows."""
    texts = ["The pilot rests. " * 30, "The crew."]
    task = loaded(written(tmp_path, [{"text": text} for text in texts]), folder, max_tokens=32)
    assert isinstance(task, Perplexity) and task.sizes[0] > 3 and task.sizes[1] == 1
    flat = load(folder)
    with torch.no_grad():
        flat.get_input_embeddings().weight.zero_()
    tokenizer = Tokenizer(folder)
    readings = read(flat, task.rows, 0, Silent())
    assert sum(len(reading.nll) for reading in readings) == sum(len(tokenizer.encode(text)) for text in texts)
    np.testing.assert_allclose(task.scores(readings), [1 / 400, 1 / 400], rtol=1e-5)
    assert task.figures(readings)["perplexity"] == pytest.approx(400, rel=1e-5)


def generated(
    model: Any, prompt: list[int], tokens: int, stop_ids: frozenset[int] = frozenset({400})
) -> list[int]:
    """transformers' own greedy answer; it would take a boundary of id 0 for padding without a mask."""
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=0,
    )
    return [token for token in answer[0, len(prompt) :].tolist() if token not in stop_ids]


def test_copying_is_what_greedy_generation_would_reproduce(model: Any, folder: Path) -> None:
    """The copies are transformers' greedy answers, spoilt from some token on."""
    tokenizer = Tokenizer(folder)
    prompts = [[0, *tokenizer.encode(text)] for text in ("The squat", "Экипаж", "Rest one", "user")]
    rows, expected = [], []
    for prompt, kept in zip(prompts, (0, 3, 7, 10), strict=True):
        answer = generated(model, prompt, 10)
        copy = answer[:kept] + [(token + 1) % 400 for token in answer[kept:]]
        rows.append(row([*prompt, *copy], [IGNORED] * len(prompt) + copy))
        expected.append(next((n for n in range(10) if copy[n] != answer[n]), 10) / 10)
    found = measure(model, [Copying("copy", rows)], 0, Silent(), batch_rows=3)[0]
    assert found.scores.tolist() == expected == [0.0, 0.3, 0.7, 1.0]
    assert found.figures == {"exact": 0.25}


def test_only_the_run_before_the_first_mistake_counts() -> None:
    hit = np.array([True, True, False, True])
    assert Copying("x", []).scores([Reading(np.zeros(4), hit, np.empty(0))]).tolist() == [0.5]


def test_copies_from_a_file(folder: Path, tmp_path: Path) -> None:
    records = [{"prompt": "Copy: plank\n", "copy": "plank"}, {"messages": USER, "copy": "squat, plank"}]
    task = loaded(written(tmp_path, records), folder)
    tokenizer = Tokenizer(folder)
    labels = [one["labels"][one["labels"] != IGNORED].tolist() for one in task.rows]
    assert tokenizer.decode(labels[0]) == "plank"
    assert labels[1] == [*tokenizer.encode("squat, plank"), tokenizer.id_of("<|im_end|>")]


# ROUGE-L by hand: words of answer, words of reference, longest common subsequence -> 2 * LCS / (both)
@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("police kill the gunman", "police killed the gunman", 2 * 3 / (4 + 4)),  # Lin 2004, section 3.1: S2
        ("the gunman kill police", "police killed the gunman", 2 * 2 / (4 + 4)),  # Lin 2004: S3
        ("The cat!", "the cat sat on the mat", 2 * 2 / (2 + 6)),
        ("Экипаж, отдыхает сегодня?", "экипаж сегодня не отдыхает", 2 * 2 / (3 + 4)),
        ("ЁЛКА", "ёлка", 1.0),
        ("", "plank", 0.0),
        ("row", "plank", 0.0),
    ],
)
def test_rouge_l_by_hand(answer: str, reference: str, f1: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(f1)


def test_words_of_both_languages() -> None:
    assert words("Тренировка 1: жим, plank.\n«Отдых»") == ["тренировка", "1", "жим", "plank", "отдых"]


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_common_words_by_the_definition(a: list[str], b: list[str]) -> None:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    assert common_words(a, b) == longest(0, 0)


def test_generated_answers_are_transformers_own(model: Any, folder: Path, tmp_path: Path) -> None:
    """References that hold half of what the model says: scores follow from transformers' own generation."""
    tokenizer = Tokenizer(folder)
    writer = Writer(tokenizer, Silent(), 256)
    stop_ids = writer.stop_ids(chat=True)
    assert stop_ids == {tokenizer.id_of("<|im_end|>"), tokenizer.boundary_id, tokenizer.eos_id}
    asked = [{"prompt": "The squat trains"}, {"prompt": "user"}, {"messages": USER}, {"messages": TURNS}]
    long = "the legs of the pilot, the arms of the crew"
    records, expected, lengths = [], [], []
    for one in asked:
        said = tokenizer.decode(generated(model, writer.prompt(one), 40, stop_ids)).strip()
        records.append({**one, "reference": f"{' '.join(words(said)[:2])} plank"})
    records.append({**asked[0], "reference": long})
    task = loaded(written(tmp_path, records), folder)
    room = max(len(tokenizer.encode(record["reference"])) for record in records)
    assert task.answer_tokens == round(1.5 * room) and task.stop_ids == stop_ids
    for record in records:
        ids = generated(model, writer.prompt(record), task.answer_tokens, stop_ids)
        text = tokenizer.decode(ids).strip()
        text = text.split("\n")[0] if "prompt" in record else text
        said, wanted = words(text), words(record["reference"])
        common = sum(word in said for word in wanted)  # all words of a reference are different, and in order
        expected.append(2 * common / (len(said) + len(wanted)) if record["reference"] != long else None)
        lengths.append(len(said))
    found = measure(model, [task], tokenizer.pad_id, Silent(), batch_rows=2)[0]
    assert found.scores[:-1].tolist() == pytest.approx(expected[:-1])
    assert sum(score > 0 for score in found.scores) >= 2, "the case says something"
    assert found.figures["answer_words"] == pytest.approx(np.mean(lengths))
    assert found.figures["reference_words"] == np.mean([len(words(record["reference"])) for record in records])


def test_a_turn_ends_where_the_template_says(folder: Path, tmp_path: Path) -> None:
    """As Gemma has it: eos ends a document, and the template ends a turn with another token."""
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).is_file():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer(folder)
    first = next(token for token, number in tokenizer.special_tokens.items() if number == tokenizer.boundary_id)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": first}))
    writer = Writer(Tokenizer(tmp_path), Silent(), 100)
    assert writer.stop_ids(chat=False) == {tokenizer.boundary_id}
    assert writer.stop_ids(chat=True) == {tokenizer.boundary_id, tokenizer.id_of("<|im_end|>")}


def test_answers_are_read_for_as_many_lines_as_asked(folder: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": "one line:\n", "reference": "the squat"},
        {"prompt": "two lines:\n", "reference": "the squat\nthe plank"},
        {"messages": USER, "reference": "the squat"},
    ]
    task = loaded(written(tmp_path, records), folder)
    assert isinstance(task, Generation) and isinstance(task, AnsweredTask) and not isinstance(task, ReadTask)
    answer = Tokenizer(folder).encode("\nthe squat\nthe plank")
    assert task.scores([answer] * 3).tolist() == pytest.approx([1.0, 1.0, 2 * 2 / (4 + 2)])
    assert task.figures([answer] * 3) == pytest.approx({"answer_words": 10 / 3, "reference_words": 8 / 3})


def test_programmes_are_judged_by_the_validator(folder: Path, tmp_path: Path) -> None:
    from random import Random

    profiles = every_profile()[100:103]
    records = [
        {"language": language, "messages": question(profile, language), "profile": profile.to_dict()}
        for language in ("en", "ru")
        for profile in profiles
    ]
    task = loaded(written(tmp_path, records), folder)
    assert isinstance(task, Programmes) and task.answer_tokens == 128
    tokenizer, rng = Tokenizer(folder), Random(1)
    texts = [answer_of(profile, language, rng) for language in ("en", "ru") for profile in profiles]
    answers = [tokenizer.encode(text) for text in texts]
    answers[1] = tokenizer.encode("Workout 1: flight.")
    assert task.scores(answers).tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert task.figures(answers) == pytest.approx({"valid_en": 2 / 3, "valid_ru": 1.0})


def test_no_token_reaches_over_the_border(folder: Path) -> None:
    """Whether the text begins with its space, the prompt has taken that already, or a word is cut in two."""
    tokenizer = Tokenizer(folder)
    writer = Writer(tokenizer, Silent(), 100)
    for prompt, text in (
        ("The squat", " legs"),
        ("The squat ", "legs"),
        ("The squat tra", "ins"),
        ("", "legs"),
    ):
        made = writer.continued({"prompt": prompt}, text)
        before = [tokenizer.boundary_id, *tokenizer.encode(prompt)]
        assert made["input_ids"][: len(before)].tolist() == before
        assert made["labels"].tolist() == [IGNORED] * len(before) + made["input_ids"][len(before) :].tolist()
        assert tokenizer.decode(made["input_ids"][len(before) :].tolist()) == text
    split = len(tokenizer.encode("The squat tra")) + len(tokenizer.encode("ins"))
    assert split > len(tokenizer.encode("The squat trains")), "the case is one where tokens would merge"


def test_a_tokenizer_that_puts_a_space_first_adds_none_behind_a_prompt(tmp_path: Path) -> None:
    """SentencePiece's habit: alone, "s" is "▁s"; behind "leg" it is "s"."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "▁leg", "▁s", "s", "▁arm", "▁"]
    backend = Backend(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    writer = Writer(Tokenizer(tmp_path), Silent(), 100)
    for text, piece in (("s", 4), (" arm", 5)):
        made = writer.continued({"prompt": "leg"}, text)
        assert made["input_ids"].tolist() == [1, 2, piece] and made["labels"].tolist() == [
            IGNORED,
            IGNORED,
            piece,
        ]


def test_first_items_are_taken_and_long_ones_left_out_whole(folder: Path, tmp_path: Path) -> None:
    short = {"prompt": "The squat", "choices": [" legs", " arms"], "answer": 0}
    long = {**short, "choices": [" legs", " the core" * 30]}
    report = Silent()
    path = written(tmp_path, [short, long, short, short])
    (task,) = load_tasks([path], Tokenizer(folder), report, max_tokens=40, max_items=3)
    assert task.sizes == [2, 2] and len(task.rows) == 4
    assert report.notes == [
        "task task: 1 of 3 items, their answers included, are longer than 40 tokens and are left out"
    ]
    with pytest.raises(InputError, match="none of its 1 items, its answer included, fits 40"):
        loaded(written(tmp_path, [long], "long"), folder, max_tokens=40)


@pytest.mark.parametrize("kind", ["generation", "programmes"])
def test_prompts_need_room_for_their_answers(kind: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder)
    if kind == "generation":
        records = [
            {"prompt": "The squat", "reference": "legs"},
            {"prompt": "rest " * 30, "reference": "legs"},
            {"prompt": "The squat", "reference": "the legs of the pilot " * 9},
        ]
    else:
        profile = every_profile()[0]
        records = [
            {"language": "en", "messages": question(profile, "en"), "profile": profile.to_dict()},
            {"language": "en", "messages": TURNS * 5 + USER, "profile": profile.to_dict()},
        ]
    path = written(tmp_path, records)
    longest = {"generation": 40, "programmes": 128 + 70}[kind]
    report = Silent()
    (task,) = load_tasks([path], tokenizer, report, max_tokens=longest, max_items=9)
    assert len(task.prompts) == 1 and max(map(len, task.prompts)) + task.answer_tokens <= longest
    assert f"{len(records) - 1} of {len(records)} items" in report.notes[0]


def test_every_problem_of_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    good = {"prompt": "a", "choices": ["b", "c"], "answer": 1}
    lines = [
        json.dumps(good),
        "",
        "{half",
        json.dumps({**good, "choices": ["b"]}),
        json.dumps({**good, "answer": 2}),
        json.dumps({**good, "answer": True}),
        json.dumps({**good, "choices": ["b", "b"]}),
        json.dumps({**good, "choices": ["b", ""]}),
        json.dumps({**good, "prompt": 3}),
        json.dumps(
            {"messages": [*USER, {"role": "assistant", "content": "x"}], "choices": ["a", "b"], "answer": 0}
        ),
        json.dumps({"messages": [], "copy": "x"}),
        json.dumps({"prompt": "a", "copy": " "}),
        json.dumps({"prompt": "a", "reference": "..."}),
        json.dumps({"messages": USER, "profile": {"level": "ace"}, "language": "en"}),
        json.dumps({"messages": USER, "profile": every_profile()[0].to_dict(), "language": "fr"}),
        json.dumps({"messages": USER}),
        json.dumps({"text": " "}),
        json.dumps({"prompt": "a", "messages": USER, "copy": "b"}),
        json.dumps({"prompt": "a"}),
        json.dumps({"prompt": "a", "copy": "b", "reference": "c"}),
        '["prompt"]',
        '{"text": "\\ud800"}',
    ]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_lines(path, 9)
    said = caught.value.message.splitlines()
    assert said[0].endswith("task.jsonl: not the lines of a task")
    wanted = [
        (3, "not JSON"), (4, "1 choices; 2 to 26"), (5, '"answer" is 2'), (6, '"answer" is True'),
        (7, "two choices are the same"), (8, "texts that are not empty"), (9, '"prompt" must be a text'),
        (10, "last message is the assistant's"), (11, 'no "messages" list'), (12, '"copy" must be'),
        (13, '"reference" must be'), (14, "level = 'ace'"), (15, "language 'fr'"),
        (16, "must be an assistant's"),
        (17, '"text" must be a text that is not empty'), (18, "no known kind"), (19, "no known kind"),
        (20, "choices, copying, generation, programmes, perplexity"), (21, "a list; a JSON object"),
        (22, "surrogate"),
    ]  # fmt: skip
    assert len(said) == 1 + len(wanted)
    for line, (number, text) in zip(said[1:], wanted, strict=True):
        assert line.strip().startswith(f"line {number}:") and text in line


def test_many_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="and 30 more"):
        read_lines(written(tmp_path, [{"prompt": "a"}] * 50), 9)


def test_lines_beyond_the_first_items_are_checked_too(tmp_path: Path) -> None:
    good = {"prompt": "a", "copy": "b"}
    assert len(read_lines(written(tmp_path, [good] * 5), 3)[1]) == 3
    with pytest.raises(InputError, match="line 5"):
        read_lines(written(tmp_path, [*[good] * 4, {"prompt": "a", "copy": 1}]), 3)


def test_one_kind_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "a"}, {"prompt": "a", "copy": "b"}])
    with pytest.raises(InputError, match=r"different kinds: perplexity \(line 1\), copying \(line 2\)"):
        read_lines(path, 9)


def test_files_that_hold_no_task(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name, said in (("none", "no such file"), ("empty", "is empty"), ("blank", "holds no item")):
        with pytest.raises(InputError, match=said):
            loaded(tmp_path / f"{name}.jsonl", folder)
    (tmp_path / "b").mkdir()
    clash = written(tmp_path / "b", [{"text": "a"}])
    tasks = load_tasks(
        [written(tmp_path, [{"text": "a"}]), clash], Tokenizer(folder), Silent(), max_tokens=9, max_items=1
    )
    assert [task.name for task in tasks] == [f"{tmp_path.name}.task", "b.task"]
    with pytest.raises(InputError, match="two tasks are called the same"):
        load_tasks([clash, clash], Tokenizer(folder), Silent(), max_tokens=9, max_items=1)


def test_messages_need_a_chat_template(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="no chat template"):
        loaded(written(tmp_path, [{"messages": USER, "copy": "b"}]), base)


def test_a_broken_model_and_a_stop(folder: Path, tmp_path: Path) -> None:
    task = loaded(written(tmp_path, [{"text": "The pilot rests."}]), folder)
    broken = load(folder)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not a number"):
        measure(broken, [task], 0, Silent())

    class Asked(Silent):
        def stop_requested(self) -> bool:
            return True

    with pytest.raises(StopRequested):
        measure(broken, [task], 0, Asked())
