"""Block Influence and angular distance are what their formulas give by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from foundation.errors import InputError, ModelError, StopRequested
from foundation.model import create
from foundation.report import Silent
from foundation.rows import Row
from prune.influence import angular_distances, block_influence

PAD, A, B = 0, 1, 2


class Steps(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    """An MLP that adds `across` times the unit vector at right angles to h, and `along` times that along it."""

    def __init__(self, across: float, along: float) -> None:
        super().__init__()
        self.across, self.along = across, along

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = x / x.norm(dim=-1, keepdim=True)
        return self.across * torch.stack([-unit[..., 1], unit[..., 0]], -1) + self.along * unit


def three_layers() -> Any:
    """Vectors of two numbers that go 4 across, then 6 back, then nowhere. Pads turn too, by another angle.

    A = (3, 0)   ->  (3, 4)    length 5     ->  length -1  ->  the same
    B = (0, 7.5) ->  (-4, 7.5) length 8.5   ->  length 2.5 ->  the same
    """
    model = create(
        {
            "model_type": "llama", "vocab_size": 3, "num_hidden_layers": 3, "hidden_size": 2,
            "intermediate_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
            "max_position_embeddings": 16, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
        },
        0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 7.5]]))
        model.model.norm.weight.copy_(torch.tensor([1.0, 5.0]))  # turns: the last layer must not be charged
        for layer, steps in zip(model.model.layers, [(4.0, 0.0), (0.0, -6.0), (0.0, 0.0)], strict=True):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp = Steps(*steps)
    return model


def row(*ids: int) -> Row:
    return {"input_ids": np.array(ids), "labels": np.full(len(ids), -100)}


@pytest.mark.parametrize("batch_rows", [1, 2, 8])
def test_block_influence_by_hand(batch_rows: int) -> None:
    """Tokens A, A, B, and A beside two pads. cos over layer 0 is 3/5 for A, 7.5/8.5 = 15/17 for B; over layer 1
    it is -1 for A, which is turned round, and 1 for B.

    BI_0 = 1 - (3 * 3/5 + 15/17) / 4 = 28/85      BI_1 = 1 - (3 * -1 + 1) / 4 = 3/2      BI_2 = 0
    """
    found = block_influence(three_layers(), [row(A), row(A, A, B)], Silent(), pad_id=PAD, batch_rows=batch_rows)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [28 / 85, 3 / 2, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_rows", [1, 2])
def test_angular_distance_by_hand(batch_rows: int) -> None:
    """Last tokens A and B: layer 0 turns them by a and b, layer 1 by pi and 0, layer 2 not at all."""
    a, b = math.acos(3 / 5), math.acos(15 / 17)
    rows = [row(A), row(A, A, B)]
    for width, wanted in [
        (1, [(a + b) / 2, math.pi / 2, 0]),
        (2, [(math.pi - a + b) / 2, math.pi / 2]),
        (3, [(math.pi - a + b) / 2]),
    ]:
        found = angular_distances(
            three_layers(), rows, Silent(), width=width, pad_id=PAD, batch_rows=batch_rows
        )
        # near 0 and pi arccos turns float32's 1e-7 into 3e-4
        np.testing.assert_allclose(found, np.array(wanted) / math.pi, rtol=0, atol=4e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_plain_numpy_over_every_row_alone(family: str) -> None:
    shape: dict[str, Any] = {
        "model_type": family, "vocab_size": 50, "num_hidden_layers": 4, "hidden_size": 16,
        "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0, "sliding_window": 4,
    }  # fmt: skip
    model = create(shape, 1).eval()
    draw = np.random.default_rng(0)
    rows = [row(*draw.integers(3, 50, length)) for length in (5, 11, 3, 9, 12)]
    cosines: list[list[float]] = [[] for _ in range(4)]
    angles: list[list[float]] = [[] for _ in range(3)]
    for each in rows:
        states = seen(model, torch.from_numpy(each["input_ids"])[None])
        for layer in range(4):
            for x, y in zip(states[layer], states[layer + 1], strict=True):
                cosines[layer].append(x @ y / np.sqrt((x @ x) * (y @ y)))
        for layer in range(3):
            x, y = states[layer][-1], states[layer + 2][-1]
            angles[layer].append(np.arccos(x @ y / np.sqrt((x @ x) * (y @ y))) / np.pi)
    found = block_influence(model, rows, Silent(), pad_id=0, batch_rows=3)
    np.testing.assert_allclose(found, 1 - np.mean(cosines, 1), rtol=0, atol=1e-6)
    turned = angular_distances(model, rows, Silent(), width=2, pad_id=0, batch_rows=3)
    np.testing.assert_allclose(turned, np.mean(angles, 1), rtol=0, atol=1e-6)


def seen(model: Any, ids: torch.Tensor) -> list[np.ndarray]:
    """h_0 to h_L [T, D] of one row in float64: the embedding, and what comes out of each layer."""
    states: list[np.ndarray] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        states.append(output.detach()[0].double().numpy())

    modules = [model.model.embed_tokens, *model.model.layers]
    handles = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return states


def test_one_pass_is_enough() -> None:
    model, calls = three_layers(), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for layer in model.model.layers:
        layer.register_forward_pre_hook(count)
    block_influence(model, [row(A)] * 6, Silent(), pad_id=PAD, batch_rows=2)
    assert calls == [3 * 3]


def test_what_can_not_be_measured_is_named() -> None:
    model = three_layers()
    with pytest.raises(InputError, match="no rows"):
        block_influence(model, [], Silent(), pad_id=PAD)
    for width in (0, 4):
        with pytest.raises(ModelError, match=f"a block of {width} layers does not lie in a model of 3"):
            angular_distances(model, [row(A)], Silent(), width=width, pad_id=PAD)
    model.model.layers[1].mlp = Steps(math.inf, 0.0)
    with pytest.raises(ModelError, match="about layer 1 are not finite"):
        block_influence(model, [row(A)], Silent(), pad_id=PAD)


def test_it_stops_when_asked() -> None:
    class Stop(Silent):
        def stop_requested(self) -> bool:
            return True

    with pytest.raises(StopRequested):
        block_influence(three_layers(), [row(A)], Stop(), pad_id=PAD)
