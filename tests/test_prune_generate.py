"""Leave-one-out answers against transformers' own generate on checkpoints that were really cut."""

from __future__ import annotations

import json
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_greedy import ANSWER_TOKENS, BASE, FAMILIES, by_transformers, random_model, random_prompts

from foundation.errors import InputError, ModelError, StopRequested
from foundation.greedy import greedy
from foundation.model import create
from foundation.report import Silent
from prune.generate import Generated, Passes, generate_without

LAYERS = BASE["num_hidden_layers"]


def really_cut(family: str, model: Any, layer: int) -> Any:
    """A new model of one layer less, made from a cut config; weights that stay have their new names."""
    config = {"model_type": family, **BASE, **FAMILIES[family], "num_hidden_layers": LAYERS - 1}
    if "layer_types" in config:
        config["layer_types"] = [kind for n, kind in enumerate(config["layer_types"]) if n != layer]
    weights = {}
    for name, value in model.state_dict().items():
        part = name.split(".")
        if part[1] == "layers":
            number = int(part[2])
            if number == layer:
                continue
            part[2] = str(number - (number > layer))
        weights[".".join(part)] = value
    made = create(config, 0)
    made.load_state_dict(weights)
    assert [block.self_attn.layer_idx for block in made.model.layers] == list(range(LAYERS - 1))
    return made.eval()


@cache
def free_answers(family: str) -> list[list[list[int]]]:
    """[L + 1][prompts] where nothing stops an answer; the whole model's come last."""
    model = random_model(family)
    models = [*(really_cut(family, model, layer) for layer in range(LAYERS)), model]
    return [by_transformers(one, random_prompts(), frozenset()) for one in models]


def stopped(free: list[list[list[int]]], stop_ids: frozenset[int]) -> list[list[list[int]]]:
    """A stop id changes nothing before it."""
    return [[list(takewhile(lambda token: token not in stop_ids, a)) for a in own] for own in free]


def answers(
    model: Any, prompts: list[list[int]], work: Path, stop_ids: frozenset[int], **more: Any
) -> Generated:
    chosen = {"answer_tokens": ANSWER_TOKENS, "pad_id": 0, "report": Silent(), "identity": "m", "batch_rows": 3}
    return generate_without(model, prompts, work=work, stop_ids=stop_ids, **{**chosen, **more})


def stops(free: list[list[list[int]]]) -> frozenset[int]:
    """Ids that end some answers: one at once, others midway."""
    return frozenset({free[0][1][0], free[2][4][3], free[LAYERS][0][5]})


@pytest.mark.parametrize(("family", "attention"), [*((name, "eager") for name in FAMILIES), ("qwen3", "sdpa")])
def test_answers_are_those_of_cut_checkpoints(family: str, attention: str, tmp_path: Path) -> None:
    model, prompts, free = random_model(family), random_prompts(), free_answers(family)
    stop_ids = stops(free)
    model.set_attn_implementation(attention)
    for number, ids in enumerate((frozenset[int](), stop_ids)):
        reference = stopped(free, ids)
        for at_once in (0, 1, 3):
            found = answers(model, prompts, tmp_path / f"{number}-{at_once}", ids, variants_at_once=at_once)
            assert found.without == reference[:LAYERS] and found.whole == reference[LAYERS]
            assert found.passes.prefill == 3 * (LAYERS + LAYERS * (LAYERS - 1) // 2)
            assert found.naive_passes.prefill == 3 * LAYERS * LAYERS
    assert len({json.dumps(own) for own in free}) == LAYERS + 1  # every layer matters
    lengths = {len(answer) for own in reference for answer in own}
    assert {0, ANSWER_TOKENS} < lengths


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("gemma3_text", 0), ("gemma3_text", 1)])
def test_all_but_one_variant_may_end(family: str, layer: int, tmp_path: Path) -> None:
    """Then nothing goes through that one's layer any more, and masks may be measured by it."""
    free = [own[:2] for own in free_answers(family)]
    longest = {token for answer in free[layer] for token in answer}
    others = [answer for n, own in enumerate(free) if n != layer for answer in own]
    stop_ids = frozenset(next(token for token in answer if token not in longest) for answer in others)
    reference = stopped(free, stop_ids)
    assert max(len(a) for n, own in enumerate(reference) if n != layer for a in own) < ANSWER_TOKENS - 3
    assert all(len(answer) == ANSWER_TOKENS for answer in reference[layer])
    found = answers(random_model(family), random_prompts()[:2], tmp_path, stop_ids)
    assert found.without == reference[:LAYERS]


class Counted:
    """Calls of the layers' feed-forward networks, which nothing leads around: [tokens of a row] -> numbers."""

    def __init__(self, model: Any) -> None:
        self.calls, self.rows = {"prefill": 0, "decode": 0}, {"prefill": 0, "decode": 0}
        self.handles = [layer.mlp.register_forward_pre_hook(self._count) for layer in model.model.layers]

    def _count(self, _: Any, args: tuple[Any, ...]) -> None:
        kind = "prefill" if args[0].shape[1] > 1 else "decode"
        self.calls[kind] += 1
        self.rows[kind] += args[0].shape[0]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_passes(at_once: int, tmp_path: Path) -> None:
    model, prompts = random_model("llama"), [prompt for prompt in random_prompts() if len(prompt) > 1]
    stop_ids = stops(free_answers("llama"))
    spent = Counted(model)
    found = answers(model, prompts, tmp_path, stop_ids, variants_at_once=at_once)
    spent.close()
    assert found.passes == Passes(spent.calls["prefill"], spent.calls["decode"])
    assert spent.rows["prefill"] == len(prompts) * (LAYERS + LAYERS * (LAYERS - 1) // 2)
    steps = [[min(len(a), ANSWER_TOKENS - 1) for a in own] for own in (*found.without, found.whole)]
    deep = [*[LAYERS - 1] * LAYERS, LAYERS]
    assert spent.rows["decode"] == sum(d * sum(own) for d, own in zip(deep, steps, strict=True))

    naive = Counted(model)  # each model alone, whose answers come from the same batches
    greedy(
        model, prompts, answer_tokens=ANSWER_TOKENS, stop_ids=stop_ids, pad_id=0, report=Silent(), batch_rows=3
    )
    naive.close()
    for layer in range(LAYERS):
        one = really_cut("llama", model, layer)
        counted = Counted(one)
        greedy(
            one,
            prompts,
            answer_tokens=ANSWER_TOKENS,
            stop_ids=stop_ids,
            pad_id=0,
            report=Silent(),
            batch_rows=3,
        )
        for kind in naive.calls:
            naive.calls[kind] += counted.calls[kind]
    assert found.naive_passes == Passes(naive.calls["prefill"], naive.calls["decode"])
    assert found.passes.decode == found.naive_passes.decode if at_once == 1 else True
    assert found.passes.decode * 2 < found.naive_passes.decode if at_once == 0 else True


def test_a_resumed_run_gives_the_same(tmp_path: Path) -> None:
    model, prompts = random_model("qwen3"), random_prompts()

    class Killed(Silent):
        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            assert unit == "prompt" and total == 7
            if done == 6:
                raise KeyboardInterrupt

    whole = answers(model, prompts, tmp_path / "whole", frozenset({7}))
    with pytest.raises(KeyboardInterrupt):
        answers(model, prompts, tmp_path / "torn", frozenset({7}), report=Killed())
    spent = Counted(model)
    assert answers(model, prompts, tmp_path / "torn", frozenset({7})) == whole
    spent.close()
    assert 0 < sum(spent.calls.values()) < sum(whole.passes) / 2  # one batch of three

    half = next((tmp_path / "torn").glob("*/000001.json"))
    half.write_bytes(half.read_bytes()[:40])
    assert answers(model, prompts, tmp_path / "torn", frozenset({7})) == whole


def test_what_was_kept_for_others_is_not_read(tmp_path: Path) -> None:
    model, other, prompts = random_model("llama"), random_model("llama", rms_norm_eps=0.5), random_prompts()
    fresh = answers(other, prompts, tmp_path / "fresh", frozenset())
    first = answers(model, prompts, tmp_path / "kept", frozenset())
    assert answers(other, prompts, tmp_path / "kept", frozenset(), identity="other") == fresh != first
    turned = answers(model, prompts[::-1], tmp_path / "kept", frozenset())
    assert turned.whole == first.whole[::-1] and turned.without == [own[::-1] for own in first.without]
    short = answers(model, prompts, tmp_path / "kept", frozenset(), answer_tokens=2)
    assert short.whole == [answer[:2] for answer in first.whole]
    assert answers(model, prompts, tmp_path / "kept", frozenset()) == first


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, prompts = random_model("gemma3_text"), random_prompts()
    ids = torch.tensor([prompts[1]], device=model.device)
    before = model(ids).logits

    class Asked(Silent):
        def stop_requested(self) -> bool:
            return True

    with pytest.raises(StopRequested):
        answers(model, prompts, tmp_path, frozenset(), report=Asked())
    answers(model, prompts, tmp_path, frozenset())
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    nothing = answers(model, [], tmp_path, frozenset())
    assert nothing == Generated([], [[]] * LAYERS, Passes(0, 0), Passes(0, 0))
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        answers(model, [[]], tmp_path, frozenset())
    with pytest.raises(ModelError, match="the model's context has 64"):
        answers(model, [[3] * 60], tmp_path, frozenset())
