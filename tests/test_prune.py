"""Layer pruning: what is cut is gone everywhere, and healing brings back what it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import chats, tiny_model

from distill.heal import HealingLoss, heal, layer_outputs
from evaluation.bits import mean_nll
from foundation.dataio import conversations, write_jsonl
from foundation.errors import ModelError
from foundation.model import create, load
from foundation.report import Silent
from foundation.rows import chat_rows, collate
from foundation.tokenizer import Tokenizer
from prune import iterate
from prune.cut import cut, without
from prune.importance import leave_one_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats())
    return path


def silence(model: torch.nn.Module, layer: int) -> None:
    """Make a layer the identity: its two output projections write nothing into the residual stream."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()


def test_cutting_an_identity_layer_changes_nothing(folder: Path) -> None:
    ids = torch.arange(3, 40)[None]
    for layer in range(4):
        model = load(folder)
        silence(model, layer)
        before = model(ids).logits
        with without(model, layer):
            torch.testing.assert_close(model(ids, use_cache=False).logits, before)
        assert len(model.model.layers) == model.config.num_hidden_layers == 4
        cut(model, layer)
        torch.testing.assert_close(model(ids).logits, before)
        assert len(model.model.layers) == model.config.num_hidden_layers == 3


def test_a_cut_model_generates_with_its_cache(folder: Path) -> None:
    model = load(folder)
    cut(model, 1)
    ids = torch.arange(3, 20)[None]
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_per_layer_lists_are_cut_with_the_layers(folder: Path) -> None:
    model = load(folder)
    model.config.layer_types = ["a", "b", "c", "d"]
    cut(model, 1)
    assert model.config.layer_types == ["a", "c", "d"]


@pytest.mark.parametrize("layer", [-1, 4])
def test_no_such_layer(folder: Path, layer: int) -> None:
    with pytest.raises(ModelError, match="can not be removed from a model of 4 layers"):
        cut(load(folder), layer)


def test_the_identity_layer_is_the_least_important(folder: Path, data: Path) -> None:
    model, tokenizer = load(folder), Tokenizer(folder)
    with torch.no_grad():  # loud layers, so that every other one matters
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(30)
    silence(model, 2)
    rows, _ = chat_rows(conversations([data]), tokenizer, 128)
    whole = mean_nll(model, rows, 0)
    scores = leave_one_out(model, rows, mean_nll, Silent(), pad_id=0)
    assert scores[2] == pytest.approx(whole, abs=1e-5)
    assert all(abs(score - whole) > 1e-4 for layer, score in enumerate(scores) if layer != 2)


def test_layer_outputs_are_taken_before_the_final_norm(folder: Path) -> None:
    model = load(folder)
    with layer_outputs(model, [1, 3]) as seen:
        model(torch.arange(3, 20)[None])
    states = model(torch.arange(3, 20)[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[1], states[2])  # hidden_states[i] is the INPUT of layer i
    torch.testing.assert_close(model.model.norm(seen[3]), states[4])  # and the last one is normed


def test_healing_loss_by_hand(folder: Path, data: Path, tmp_path: Path) -> None:
    teacher, student = load(folder), load(tiny_model(tmp_path, seed=8, layers=3))
    rows, _ = chat_rows(conversations([data]), Tokenizer(folder), 128)
    batch = collate(rows[:3], 0)
    loss = HealingLoss(student, teacher, [(1, 2), (2, 3)], 0.5)(student, batch, torch.tensor(7))
    total = 0.0
    for n in range(3):
        ids = torch.from_numpy(rows[n]["input_ids"])[None]
        with layer_outputs(teacher, [2, 3]) as target, layer_outputs(student, [1, 2]) as own:
            t, s = teacher(ids).logits.log_softmax(-1)[0], student(ids).logits.log_softmax(-1)[0]
        for position in range(1, ids.shape[1]):
            if rows[n]["labels"][position] != -100:
                before = position - 1
                total += (t[before].exp() * (t[before] - s[before])).sum().item()
                for a, b in ((1, 2), (2, 3)):
                    total += 0.5 * (own[a][0, before] - target[b][0, before]).square().mean().item()
    assert loss.item() == pytest.approx(total / 7, rel=1e-4)


@pytest.mark.slow
def test_iterate_heals_resumes_and_writes_the_same_bytes(folder: Path, data: Path, tmp_path: Path) -> None:
    chosen = iterate.Settings(remove_layers=2, steps=8, batch_rows=6, warmup_steps=1, checkpoint_every_steps=3,
                              sample_rows=6, trains="all", learning_rate=3e-3)  # fmt: skip
    inputs = {"model": folder, "data": (data,)}
    figures = iterate.run(chosen, inputs, tmp_path / "whole", Silent(), heal=heal, score=mean_nll)
    assert figures["layers"] == 2

    class Kill(Silent):
        steps = 0

        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            self.steps += 1
            if self.steps == 10:  # at first inside a healing, then while the next round is scored
                raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            iterate.run(chosen, inputs, tmp_path / "torn", Kill(), heal=heal, score=mean_nll)
    iterate.run(chosen, inputs, tmp_path / "torn", Silent(), heal=heal, score=mean_nll)
    for name in ("model/model.safetensors", "model/config.json", "removed.json"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rounds = json.loads((tmp_path / "whole" / "removed.json").read_text())["rounds"]
    assert len({r["removed"] for r in rounds}) == 2
    assert load(tmp_path / "whole" / "model").config.num_hidden_layers == 2


def test_one_layer_must_stay(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one must stay"):
        iterate.run(
            iterate.Settings(remove_layers=4), {"model": folder, "data": (data,)}, tmp_path, Silent(),
            heal=heal, score=mean_nll,
        )  # fmt: skip


def test_neighbours_alone_are_healed(folder: Path, data: Path, tmp_path: Path) -> None:
    teacher, student = load(folder), load(folder)
    cut(student, 2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    rows, _ = chat_rows(conversations([data]), Tokenizer(folder), 128)
    chosen = iterate.Settings(steps=2, warmup_steps=0, batch_rows=4)
    heal(student, teacher, [0, 1, 3], [1, 2], rows, chosen, tmp_path, Silent(), pad_id=0, hidden_weight=1.0)
    changed = {n for n, value in student.state_dict().items() if not torch.equal(value, before[n])}
    assert changed and all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in changed)


def test_qwen3_is_cut_too(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3",
        "vocab_size": 64,
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    model = create(config, 0).eval()
    cut(model, 0)
    assert len(model.config.layer_types) == 2
    assert model(torch.arange(10)[None]).logits.shape == (1, 10, 64)
