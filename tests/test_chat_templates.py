"""Conversations of well-known families: texts written out by hand, ids and masks of transformers.

The templates are in chat_formats.py. transformers marks answers by their {% generation %} blocks, which this
project does not read: where both name the same tokens, two ways that share no code agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_formats import FORMATS, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from distill import capture, train
from distill.store import TopKStore
from foundation.chat import IGNORED, Chat, ChatTemplate, Encoded
from foundation.dataio import Message, conversations, write_jsonl
from foundation.errors import ModelError
from foundation.report import Silent
from foundation.rows import chat_rows
from foundation.tokenizer import Tokenizer

ALTERNATING = ("gemma2", "gemma3", "mistral-v0.1", "mistral-v0.3", "mistral-nemo")
REWRITING = ("qwen3", "mistral-v0.1", "mistral-v0.3", "mistral-nemo")  # with a system prompt, at least
DATE = "26 Jul 2024"
HEAD = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


TALK = [
    said("system", "Будь краток."),
    said("user", "A squat?"),
    said("assistant", "Legs. 🦵"),
    said("user", "А планка? "),
    said("assistant", "Корпус."),
]
PLAIN = TALK[1:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: tokenizer_of(name, tmp_path_factory.mktemp("formats") / name) for name in FORMATS}


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Control tokens included, and every space that the tokenizer put anywhere."""
    return tokenizer._backend.decode(ids, skip_special_tokens=False)


def spans(encoded: Encoded) -> Iterator[list[int]]:
    current: list[int] = []
    for label in [*encoded.labels, IGNORED]:
        if label != IGNORED:
            current.append(label)
        elif current:
            yield current
            current = []


def by_transformers(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """(ids, mask) of the conversation as one text."""
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer.folder)
    found = reference.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, date_string=DATE
    )
    return list(found["input_ids"]), list(found["assistant_masks"])


# --------------------------------------------------------------------------------- texts, written out by hand

EXPECTED: dict[str, tuple[list[Message], str]] = {
    "qwen2.5": (
        PLAIN,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nA squat?<|im_end|>\n<|im_start|>assistant\nLegs. 🦵<|im_end|>\n"
        "<|im_start|>user\nА планка? <|im_end|>\n<|im_start|>assistant\nКорпус.<|im_end|>\n",
    ),
    "qwen3": (
        TALK,
        "<|im_start|>system\nБудь краток.<|im_end|>\n<|im_start|>user\nA squat?<|im_end|>\n"
        "<|im_start|>assistant\nLegs. 🦵<|im_end|>\n<|im_start|>user\nА планка? <|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nКорпус.<|im_end|>\n",
    ),
    "llama3": (
        TALK,
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{HEAD}Будь краток.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nA squat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nLegs. 🦵<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nА планка?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nКорпус.<|eot_id|>",
    ),
    "gemma2": (
        PLAIN,
        "<bos><start_of_turn>user\nA squat?<end_of_turn>\n<start_of_turn>model\nLegs. 🦵<end_of_turn>\n"
        "<start_of_turn>user\nА планка?<end_of_turn>\n<start_of_turn>model\nКорпус.<end_of_turn>\n",
    ),
    "gemma3": (
        TALK,
        "<bos><start_of_turn>user\nБудь краток.\n\nA squat?<end_of_turn>\n"
        "<start_of_turn>model\nLegs. 🦵<end_of_turn>\n"
        "<start_of_turn>user\nА планка?<end_of_turn>\n<start_of_turn>model\nКорпус.<end_of_turn>\n",
    ),
    "mistral-v0.3": (
        TALK,
        "<s>[INST] A squat?[/INST] Legs. 🦵</s>[INST] Будь краток.\n\nА планка? [/INST] Корпус.</s>",
    ),
    "mistral-nemo": (
        TALK,
        "<s>[INST]A squat?[/INST]Legs. 🦵</s>[INST]Будь краток.\n\nА планка? [/INST]Корпус.</s>",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_family_is_rendered_as_it_is_known(name: str, made: dict[str, Tokenizer]) -> None:
    from transformers import AutoTokenizer

    talk, text = EXPECTED[name]
    chat, reference = Chat(made[name]), AutoTokenizer.from_pretrained(made[name].folder)
    assert chat.render(talk, prompt=False) == text
    assert reference.apply_chat_template(talk, tokenize=False, date_string=DATE) == text
    asked = reference.apply_chat_template(
        talk[:-1], tokenize=False, add_generation_prompt=True, date_string=DATE
    )
    assert chat.render(talk[:-1], prompt=True) == asked
    assert text.startswith(asked) and "Корпус" not in asked


def test_the_answer_that_qwen3_writes_begins_with_its_thoughts(made: dict[str, Tokenizer]) -> None:
    """The generation prompt ends before <think>: an empty block of thoughts is the model's to write."""
    tokenizer = made["qwen3"]
    (row,) = Chat(tokenizer).encode(TALK[:3])
    (span,) = spans(row)
    assert text_of(tokenizer, span) == "<think>\n\n</think>\n\nLegs. 🦵<|im_end|>"
    thoughts = [*TALK[:2], said("assistant", "<think>\nHm.\n</think>\n\nLegs.")]
    (span,) = spans(Chat(tokenizer).encode(thoughts)[0])
    assert text_of(tokenizer, span) == "<think>\nHm.\n</think>\n\nLegs.<|im_end|>"


def test_a_prompt_that_opens_the_thoughts_keeps_them_out_of_the_labels(tmp_path: Path) -> None:
    """As where thinking is switched off: what the prompt wrote already, the model does not write."""
    tokenizer = tokenizer_of("qwen3", tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}")
    (row,) = Chat(Tokenizer(tmp_path)).encode(TALK[:3])
    (span,) = spans(row)
    assert text_of(tokenizer, span) == "Legs. 🦵<|im_end|>"


# ------------------------------------------------------------------------------------------- rows and masks


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_what_transformers_makes_of_what_the_model_sees(name: str, made: dict[str, Tokenizer]) -> None:
    """One row where the template only appends, else one an answer; ids and mask are transformers' own."""
    tokenizer = made[name]
    talk = PLAIN if name == "gemma2" else TALK
    rows = Chat(tokenizer).encode(talk)
    if name in REWRITING:
        ends = [number for number, message in enumerate(talk, 1) if message["role"] == "assistant"]
    else:
        ends = [len(talk)]
    assert len(rows) == len(ends)
    for row, end in zip(rows, ends, strict=True):
        ids, mask = by_transformers(tokenizer, talk[:end])
        assert row.ids == ids[: len(row.ids)]
        assert text_of(tokenizer, ids[len(row.ids) :]).strip() == ""
        if name in REWRITING:  # earlier answers are what was said, not what is to be learned
            last = max(place for place, marked in enumerate(mask) if not marked and place < len(row.ids))
            mask = [0] * (last + 1) + mask[last + 1 :]
        assert [label != IGNORED for label in row.labels] == [bool(m) for m in mask[: len(row.ids)]]
        assert all(label in (IGNORED, i) for label, i in zip(row.labels, row.ids, strict=True))
        assert row.ids[-1] == row.labels[-1] == tokenizer.id_of(FORMATS[name].end)
        if bos := FORMATS[name].bos:
            assert row.ids.count(tokenizer.id_of(bos)) == 1 and row.ids[0] == tokenizer.id_of(bos)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_follow_the_prompt_that_the_model_is_given(name: str, made: dict[str, Tokenizer]) -> None:
    """Every labelled answer stands behind the very ids that serving and evaluation would send."""
    tokenizer, talk = made[name], PLAIN if name == "gemma2" else TALK
    chat = Chat(tokenizer)
    rows = chat.encode(talk)
    answers = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
    found = [(row, place) for row in rows for place in starts(row)]
    assert len(found) == len(answers) == 2
    for (row, place), number in zip(found, answers, strict=True):
        assert row.ids[:place] == chat.prompt_ids(talk[:number])


def starts(row: Encoded) -> list[int]:
    labelled = [label != IGNORED for label in row.labels]
    return [n for n, here in enumerate(labelled) if here and not labelled[n - 1]]


@pytest.mark.parametrize("name", ["mistral-v0.3", "mistral-nemo", "mistral-v0.1"])
def test_mistral_without_a_system_prompt_only_appends(name: str, made: dict[str, Tokenizer]) -> None:
    (row,) = Chat(made[name]).encode(PLAIN)
    ids, mask = by_transformers(made[name], PLAIN)
    assert row.ids == ids and [label != IGNORED for label in row.labels] == [bool(m) for m in mask]
    assert len(list(spans(row))) == 2


def test_rows_begin_anew_only_where_the_text_was_rewritten(made: dict[str, Tokenizer]) -> None:
    """Two answers to one question: Qwen3 rewrites neither until the next question comes."""
    thinking = "<think>\nHm.\n</think>\n\n"
    talk = [
        said("user", "A squat?"),
        said("assistant", thinking + "Legs."),
        said("assistant", thinking + "And more."),
        said("user", "А планка?"),
        said("assistant", "Корпус."),
    ]
    tokenizer = made["qwen3"]
    first, second = Chat(tokenizer).encode(talk)
    assert [text_of(tokenizer, span) for span in spans(first)] == [
        f"{thinking}Legs.<|im_end|>",
        f"{thinking}And more.<|im_end|>",
    ]
    assert [text_of(tokenizer, span) for span in spans(second)] == ["<think>\n\n</think>\n\nКорпус.<|im_end|>"]
    assert "Hm." not in text_of(tokenizer, second.ids)


CONTENT = st.text(st.sampled_from("aA .\n!-0ёЯшщ🦵é—\t"), max_size=20)


@given(contents=st.lists(CONTENT, min_size=2, max_size=6), system=st.one_of(st.none(), CONTENT))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_said(
    name: str, made: dict[str, Tokenizer], contents: list[str], system: str | None
) -> None:
    """The rows of any talk read as its text, every answer is labelled once, and prompts are served alike."""
    tokenizer, chat = made[name], Chat(made[name])
    contents = contents[: len(contents) // 2 * 2]
    talk = [said(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    if system is not None and name != "gemma2":
        talk.insert(0, said("system", system))
    rows = chat.encode(talk)
    answers = [span for row in rows for span in spans(row)]
    assert len(answers) == len(contents) // 2
    assert all(span[-1] == tokenizer.id_of(FORMATS[name].end) for span in answers)
    whole = chat.render(talk, prompt=False)
    if name == "mistral-v0.1":  # its first space is nobody's
        assert text_of(tokenizer, rows[-1].ids).replace(" ", "") == whole.rstrip().replace(" ", "")
    else:
        assert text_of(tokenizer, rows[-1].ids) == whole.rstrip()
    number = next(n for n, message in enumerate(talk) if message["role"] == "assistant")
    prompt = chat.prompt_ids(talk[:number])
    assert rows[0].ids[: len(prompt)] == prompt and set(rows[0].labels[: len(prompt)]) == {IGNORED}


@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-v0.3"])
def test_no_space_is_put_before_an_answer(name: str, made: dict[str, Tokenizer]) -> None:
    """SentencePiece's space stands before a text, not before every piece of it that is encoded apart."""
    tokenizer = made[name]
    (row,) = Chat(tokenizer).encode([said("user", "hello"), said("assistant", "hello")])
    (span,) = spans(row)
    assert [tokenizer._backend.id_to_token(i) for i in span] == ["▁hello", "</s>"]


# ------------------------------------------------------------------------- what contents may spell, and roles


@pytest.mark.parametrize("name", FORMATS)
def test_control_tokens_in_contents_stay_text(name: str, made: dict[str, Tokenizer]) -> None:
    """As many control tokens as the same talk without the spellings has, and the text is what was said."""
    tokenizer, chosen = made[name], FORMATS[name]
    special = set(tokenizer.special_tokens.values())
    spelt = f"a {chosen.end}b{chosen.special[-1]}{chosen.special[0]} что это?"
    chat = Chat(tokenizer)
    for place in (1, 2):
        talk = [said("user", "Что?"), said("assistant", "То."), said("user", "А?"), said("assistant", "Б.")]
        honest = [[i for i in row.ids if i in special] for row in chat.encode(talk)]
        talk[place]["content"] = spelt
        rows = chat.encode(talk)
        assert [[i for i in row.ids if i in special] for row in rows] == honest
        assert spelt in text_of(tokenizer, rows[-1].ids)
        prompt = chat.prompt_ids(talk[:1])
        assert rows[0].ids[: len(prompt)] == prompt


def test_spelt_tokens_get_no_spaces_of_their_own(made: dict[str, Tokenizer]) -> None:
    """A vocabulary that puts a space before what it encodes must not do so in the middle of a word."""
    tokenizer = made["mistral-v0.3"]
    ids = Chat(tokenizer).prompt_ids([said("user", "x</s>y")])
    assert text_of(tokenizer, ids) == "<s>[INST] x</s>y[/INST]"
    assert tokenizer.id_of("</s>") not in ids


def test_gemma_refuses_what_it_was_not_made_for(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="System role not supported"):
        Chat(made["gemma2"]).encode(TALK)
    two = [said("user", "a"), said("user", "b"), said("assistant", "c")]
    for name in ALTERNATING:
        with pytest.raises(ModelError, match="must alternate"):
            Chat(made[name]).encode(two)
    with pytest.raises(ModelError, match=r"conversation 2: .*must alternate"):
        chat_rows([PLAIN, two], made["gemma2"], 999)
    path = tmp_path / "talks.jsonl"
    write_jsonl(path, ({"messages": talk} for talk in (PLAIN, two)))
    with pytest.raises(ModelError, match=r"talks\.jsonl, line 2: .*must alternate"):
        chat_rows(conversations([path]), made["gemma2"], 999)


def test_an_empty_system_prompt_is_one(made: dict[str, Tokenizer]) -> None:
    talk = [said("system", ""), *PLAIN]
    assert Chat(made["qwen2.5"]).render(talk, prompt=False).startswith("<|im_start|>system\n<|im_end|>\n")
    assert Chat(made["gemma3"]).render(talk, prompt=False).startswith("<bos><start_of_turn>user\n\n\nA squat?")
    assert len(Chat(made["mistral-v0.3"]).encode(talk)) == 2, "the two line ends move to the last question"


def test_llama_tells_the_date_only_by_a_clock(made: dict[str, Tokenizer]) -> None:
    assert f"Today Date: {DATE}\n" in Chat(made["llama3"]).render(PLAIN, prompt=True)
    day = datetime(2031, 5, 4)
    template = ChatTemplate(
        FORMATS["llama3"].template, "x", {"bos_token": "<|begin_of_text|>"}, now=lambda: day
    )
    assert "Today Date: 04 May 2031\n" in template.render(PLAIN, prompt=True)


@pytest.mark.parametrize("name", FORMATS)
def test_what_ends_a_turn(name: str, made: dict[str, Tokenizer]) -> None:
    ends = Chat(made[name]).end_ids
    assert made[name].id_of(FORMATS[name].end) in ends and made[name].eos_id in ends


# ------------------------------------------------------------------------------------- {% generation %} blocks


@pytest.mark.parametrize("reach", ["header", "content"])
def test_marks_of_another_reach_do_not_move_the_labels(reach: str, tmp_path: Path) -> None:
    """Blocks that hold the header, or leave out the end token: the labels are what the model has to write."""
    tokenizer = tokenizer_of("qwen2.5", tmp_path)
    (wanted,) = Chat(tokenizer).encode(TALK)
    opened, closed = {
        "header": ("{% generation %}<|im_start|>assistant\n", "<|im_end|>\n{% endgeneration %}"),
        "content": ("<|im_start|>assistant\n{% generation %}", "{% endgeneration %}<|im_end|>\n"),
    }[reach]
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + opened.replace("\n", "{{ '\\n' }}")
        + "{{ m.content }}"
        + closed.replace("\n", "{{ '\\n' }}")
        + "{% else %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(source)
    (row,) = Chat(Tokenizer(tmp_path)).encode(TALK)
    assert row == wanted
    _, mask = by_transformers(tokenizer, TALK)
    theirs = {place for place, marked in enumerate(mask) if marked}
    ours = {place for place, label in enumerate(row.labels) if label != IGNORED}
    assert theirs > ours if reach == "header" else theirs < ours


# ------------------------------------------------------------------------- the store splits as training does


def split_model(folder: Path) -> Path:
    """A tiny model whose template drops what earlier answers begin with, as Qwen3's does."""
    tiny_model(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ 'so: ' }}{% endif %}"
        "{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    )
    return folder


def talks(folder: Path) -> Path:
    path = folder / "talks.jsonl"
    write_jsonl(path, [{"messages": [said("user", f"Train {n}."), said("assistant", f"squat {n}"),
                                     said("user", "Rest?"), said("assistant", f"plank {n}")]}
                       for n in range(5)])  # fmt: skip
    return path


def test_a_store_fits_the_rows_that_training_makes(tmp_path: Path) -> None:
    folder, data = split_model(tmp_path / "model"), talks(tmp_path)
    tokenizer = Tokenizer(folder)
    figures = capture.run(
        capture.Settings(top_k=8, shard_rows=3), {"teacher": folder, "data": data}, tmp_path, Silent()
    )
    assert (figures["rows"], figures["too_long"]) == (10, 0), "two answers in each of five conversations"
    store, (rows, *_) = TopKStore(tmp_path / "store"), chat_rows(conversations([data]), tokenizer, 128)
    beside = store.beside(rows, tokenizer, temperature=1.0)
    assert len(beside) == 10
    for number in range(10):
        counted = beside[number]["topk_logprobs"][:, 0] < 0
        assert (counted == (rows[number]["labels"] != IGNORED)).all()
        assert np.isfinite(beside[number]["gold_logprob"]).all()
    trained = train.run(
        train.Settings(loss="published_code", steps=2, max_tokens=128),
        {"model": folder, "data": data, "teacher": tmp_path / "store"},
        tmp_path / "trained",
        Silent(),
    )
    assert trained["rows"] == 10


def test_only_the_turns_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    folder, data = split_model(tmp_path / "model"), talks(tmp_path)
    rows, *_ = chat_rows(conversations([data]), Tokenizer(folder), 999)
    short = max(len(row["input_ids"]) for row in rows[::2])
    assert short < min(len(row["input_ids"]) for row in rows[1::2])
    fitting, _, too_long = chat_rows(conversations([data]), Tokenizer(folder), short)
    assert (len(fitting), too_long) == (5, 5)
    report = Silent()
    figures = capture.run(
        capture.Settings(top_k=8, max_tokens=short), {"teacher": folder, "data": data}, tmp_path, report
    )
    assert (figures["rows"], figures["too_long"]) == (5, 5)
    (note,) = [note for note in report.notes if "exceed" in note]
    assert f"{data}, line 1 (" in note and f"{data}, line 5 (" in note


# ----------------------------------------------------------------------------------------------- the real one


@pytest.mark.realdata
def test_the_real_qwen_template(samovar_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(samovar_data / "tokenizers" / "qwen2.5")
    reference.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    own = ChatTemplate(FORMATS["qwen2.5"].template, "own")
    for talk in (
        TALK,
        PLAIN,
        [said("system", ""), *PLAIN],
        [said("user", " a \n"), said("assistant", " b \n")],
    ):
        text = reference.apply_chat_template(talk, tokenize=False)
        assert Chat(tokenizer).render(talk, prompt=False) == text == own.render(talk, prompt=False)
        ids: Any = reference.apply_chat_template(talk, return_dict=False)
        (row,) = Chat(tokenizer).encode(talk)
        assert row.ids == ids[:-1] and ids[-1:] == tokenizer.encode("\n")
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        assert [tokenizer.decode(span) for span in spans(row)] == answers
        assert all(span[-1] == tokenizer.eos_id for span in spans(row))
