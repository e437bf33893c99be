"""Rewards against transformers, one conversation at a time; padding, limits, refusals, stops."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import StopsAfter
from tiny import TEXTS, tiny_tokenizer

import corpora.choose
import corpora.reward
from corpora.reward import Settings, run
from corpora.reward_model import RewardModel
from foundation.dataio import Message, write_jsonl
from foundation.errors import InputError, ModelError, StopRequested
from foundation.model import quiet_transformers
from foundation.report import Silent
from foundation.tokenizer import Tokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 1,
}
WORDS = ["кот", "дом", "лес", "run", "rest", "squat", "plank", "cat", "day", "week", "good", "bad"]


def conversations(count: int = 40) -> list[dict[str, Any]]:
    """Conversations of very different lengths, some of several turns; keys in an order of their own."""
    rng = np.random.default_rng(2)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, size=int(rng.integers(1, most))))

    rows = []
    for number in range(count):
        messages = [{"role": "user", "content": words(12)}, {"role": "assistant", "content": words(12)}]
        if number % 4 == 0:
            messages += [{"content": words(4), "role": "user"}, {"role": "assistant", "content": words(9)}]
        if number % 5 == 0:
            messages.insert(0, {"role": "system", "content": "кот"})
        rows.append({"id": number, "messages": messages, "note": "ё"})
    return rows


def data_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines whose spacing is not ours: kept lines must come out as they went in."""
    path.write_text("".join(json.dumps(row, indent=None, separators=(" ,", ":  ")) + "\n\n" for row in rows))
    return path


def save(config: Any, folder: Path, seed: int = 0) -> Path:
    """A random classifier with weights large enough that a token more or less shows."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def decoder(folder: Path, pad_id: int | None = 0, **changes: Any) -> Path:
    """A Llama with a ChatML template, read at its last token.

    Without padding that token is the one of id 0, which a careless filling would take for padding.
    """
    from transformers import LlamaConfig

    tokenizer = Tokenizer(tiny_tokenizer(folder))
    if pad_id is None:
        spelling = next(spelling for spelling, number in tokenizer.special_tokens.items() if number == 0)
        (folder / "chat_template.jinja").write_text(f"{tokenizer.chat_template}{spelling}")
    config = SMALL | {"vocab_size": 400, "pad_token_id": pad_id, "max_position_embeddings": 256} | changes
    return save(LlamaConfig(**config), folder)


def encoder(folder: Path, kind: str = "bert", parts: bool = True, **changes: Any) -> Path:
    """A BERT (with `parts` those of a pair are marked) or an XLM-RoBERTa (positions begin behind padding)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, PreTrainedTokenizerFast, XLMRobertaConfig

    texts = [*TEXTS, *WORDS]
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        tokenizer = Backend(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        pair, names = "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        tokenizer = Backend(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        pair, names = "<s> $A </s> </s> $B </s>", ("<s>", "</s>")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}",
        pair=pair,
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    tokenizer.enable_truncation(6)  # files in the wild say so; it must cut nothing here
    tokenizer.enable_padding(length=64)
    roles = dict(zip(("cls_token", "sep_token"), names, strict=True))
    pad, unknown = (special[0], special[1]) if kind == "bert" else (special[1], special[3])
    fed = ["input_ids", "attention_mask"] + ["token_type_ids"] * parts
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, model_input_names=fed, **roles
    ).save_pretrained(folder)
    shape = {"max_position_embeddings": 128, "pad_token_id": special.index(pad)}
    config = (BertConfig if kind == "bert" else XLMRobertaConfig)(
        **(SMALL | {"vocab_size": tokenizer.get_vocab_size(), "type_vocab_size": 2 if kind == "bert" else 1})
        | shape
        | changes
    )
    return save(config, folder)


KINDS = {
    "decoder": decoder,
    "decoder without padding": partial(decoder, pad_id=None),
    "bert": encoder,
    "bert without parts": partial(encoder, parts=False),
    "xlm-roberta": partial(encoder, kind="xlm-roberta"),
}


def reference(folder: Path, rows: list[dict[str, Any]]) -> list[float]:
    """transformers' own tokenizer and model, one conversation a forward pass."""
    import torch

    transformers = quiet_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    found = []
    for row in rows:
        messages = row["messages"]
        if tokenizer.chat_template:
            encoded = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        else:
            prompt = "\n".join(m["content"] for m in messages[:-1])
            encoded = tokenizer(
                prompt, messages[-1]["content"], return_tensors="pt", truncation=False, padding=False
            )
            if getattr(model.config, "type_vocab_size", 1) == 1:
                encoded.pop("token_type_ids", None)
        with torch.inference_mode():
            found.append(float(model(**encoded).logits[0, 0]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_those_of_transformers_and_padding_changes_none(tmp_path: Path, kind: str) -> None:
    folder = KINDS[kind](tmp_path / "reward")
    rows = conversations()
    expected = reference(folder, rows)
    assert np.std(expected) > 0.01, "a constant reward would prove nothing"
    model = RewardModel(folder)
    messages = [row["messages"] for row in rows]
    one = corpora.reward.scores(model, messages, 256, 1)
    many = corpora.reward.scores(model, messages, 256, 32)
    assert one == pytest.approx(expected, abs=1e-5)
    assert many == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "xlm-roberta"])
def test_the_stage_keeps_lines_as_they_were(tmp_path: Path, kind: str) -> None:
    folder, rows = KINDS[kind](tmp_path / "reward"), conversations()
    paths = data_file(tmp_path / "a.jsonl", rows[:25]), data_file(tmp_path / "b.jsonl", rows[25:])
    figures = run(
        Settings(keep_share=0.25, batch_rows=4), {"data": paths, "reward": folder}, tmp_path, Silent()
    )
    expected = reference(folder, rows)
    best = sorted(sorted(range(40), key=lambda number: -expected[number])[:10])
    lines = [line for path in paths for line in path.read_text().splitlines() if line]
    assert (tmp_path / "data.jsonl").read_text().splitlines() == [lines[number] for number in best]
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    for row in rejected:
        number = row["id"]
        assert row.pop("reward") == pytest.approx(expected[number], abs=1e-4)
        assert row == rows[number] and number not in best
    assert len(rejected) == 30
    assert figures == {"read": 40, "too_long": 0, "kept": 10, "kept_share": 0.25}


def test_what_is_too_long_is_rejected_unscored(tmp_path: Path) -> None:
    """XLM-RoBERTa can not use its first two positions: they belong to padding."""
    rows = conversations()
    roomy = RewardModel(encoder(tmp_path / "roomy", "xlm-roberta"))
    lengths = [len(roomy.encode(row["messages"]).ids) for row in rows]
    border = next(length for length in sorted(lengths)[10:] if length + 1 in lengths)
    folder = encoder(tmp_path / "reward", "xlm-roberta", max_position_embeddings=border + 2)
    assert RewardModel(folder).longest == border
    report = Silent()
    data = data_file(tmp_path / "a.jsonl", rows)
    figures = run(Settings(threshold=-100.0), {"data": data, "reward": folder}, tmp_path, report)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rejected] == [n for n, length in enumerate(lengths) if length > border]
    assert all(row["reward"] is None for row in rejected)
    assert figures["too_long"] == len(rejected) > 0 and figures["kept_share"] == 1
    assert any(f"exceed {border} tokens" in note for note in report.notes)
    shorter = Settings(threshold=-100.0, max_tokens=sorted(lengths)[5])
    (tmp_path / "again").mkdir()
    figures = run(shorter, {"data": data, "reward": folder}, tmp_path / "again", Silent())
    assert figures["too_long"] == sum(length > shorter.max_tokens for length in lengths)


@pytest.mark.parametrize("kind", ["decoder", "bert"])
def test_a_control_token_in_an_answer_is_text(tmp_path: Path, kind: str) -> None:
    model = RewardModel(KINDS[kind](tmp_path))
    token = {"decoder": "<|im_end|>", "bert": "[SEP]"}[kind]
    number = model.tokenizer.id_of(token)

    def ids(answer: str) -> list[int]:
        messages: list[Message] = [
            {"role": "user", "content": "кот"},
            {"role": "assistant", "content": answer},
        ]
        return model.encode(messages).ids

    assert ids(f"run {token} rest").count(number) == ids("run rest").count(number) == 2  # type: ignore[arg-type]


def test_stops_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.reward, "CHUNK_BATCHES", 2)
    monkeypatch.setattr(corpora.choose, "WRITTEN_ROWS", 9)
    folder, data = decoder(tmp_path / "reward"), data_file(tmp_path / "a.jsonl", conversations())
    chosen = Settings(keep_share=0.5, batch_rows=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run(chosen, {"data": data, "reward": folder}, whole, Silent())
    for questions in (0, 2, 4, 3):
        with pytest.raises(StopRequested):
            run(chosen, {"data": data, "reward": folder}, parts, StopsAfter(questions))
    run(chosen, {"data": data, "reward": folder}, parts, Silent())
    for name in ("data.jsonl", "rejected.jsonl", "scores.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_bfloat16_orders_nearly_as_float32(tmp_path: Path) -> None:
    folder, messages = decoder(tmp_path), [row["messages"] for row in conversations()]
    full = corpora.reward.scores(RewardModel(folder), messages, 256, 8)
    half = corpora.reward.scores(RewardModel(folder, "bf16"), messages, 256, 8)
    assert np.corrcoef(full, half)[0, 1] > 0.99 and (full != half).any()


def test_what_is_no_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def refused(folder: Path, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            RewardModel(folder)

    refused(encoder(tmp_path / "two", num_labels=3), r"BertForSequenceClassification has 3 logits \(LABEL_0, ")
    folder = decoder(tmp_path / "one")
    config = json.loads((folder / "config.json").read_text())

    def changed(**values: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | values))

    changed(architectures=["LlamaForCausalLM"])
    refused(folder, "LlamaForCausalLM is no reward model; ForSequenceClassification with one logit is needed")
    changed(architectures=None)
    refused(folder, "no architecture is no reward model")
    changed(num_hidden_layers=3)
    refused(folder, r"do not belong together: \d+ missing \(first: model.layers.2")
    changed()
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"1 missing \(first: score.weight\)")
    save_file(
        weights | {"score.weight": head, "v_head.weight": head.clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(folder, r"1 not of this model \(first: v_head.weight\)")
    save_file(
        weights | {"score.weight": head * math.nan}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    model = RewardModel(folder)
    with pytest.raises(ModelError, match="the reward is not a number"):
        model.scores([model.encode(conversations(1)[0]["messages"])])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"no \*.safetensors")


def test_bad_data_is_named(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "reward")
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "кот"}]}])
    with pytest.raises(InputError, match=r"a.jsonl, line 1: the last message must be an assistant's"):
        run(Settings(threshold=0.0), {"data": tmp_path / "a.jsonl", "reward": folder}, tmp_path, Silent())
