"""The head kept apart from its body says what the model's own logits say, for every kind of head."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import chats, tiny_model
from torch import nn
from torch.nn.functional import cross_entropy

from foundation.chunked import Product, chunked_nll
from foundation.errors import ModelError
from foundation.head import Head, hidden_of
from foundation.losses import counted, logits_of, next_token_nll, predicting
from foundation.model import create
from foundation.rows import chat_rows, collate
from foundation.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 90, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# What stands between hidden states and logits: nothing, a tied head, biases, soft-caps, scales (two families
# give one name opposite meanings).
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.0625, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 13.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "phi": {},  # the head has a bias
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},  # so has this
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def made(kind: str, **changes: object) -> Any:
    model = create({**SHAPE, **KINDS[kind], "model_type": kind.partition(" ")[0], **changes}, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def some_batch(rows: int = 3, tokens: int = 11, vocab: int = 90) -> dict[str, torch.Tensor]:
    """Rows of unequal length with random labels, a third of them not counted."""
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(3, vocab, (rows, tokens), generator=draw)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.3, -100)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, tokens - row :] = 0
        labels[row, tokens - row :] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "topk_ids": ids[..., None]}


def full_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """The formula of foundation/head.py, written out."""
    z = sum(project(hidden) @ weight.T for project, weight in head.factors)
    z = head.scale * (z if head.bias is None else z + head.bias)
    return z if head.cap == float("inf") else head.cap * torch.tanh(z / head.cap)


def assert_equals_own_logits(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Logits, and the gradient of every parameter, against the model's own forward pass."""
    model.eval()
    labels = batch["labels"]
    own = logits_of(model, batch)
    hidden, head = hidden_of(model, batch)
    torch.testing.assert_close(full_logits(hidden, head), own, rtol=2e-5, atol=2e-5)
    wanted = cross_entropy(predicting(own, labels), counted(labels, labels), reduction="sum")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(wanted, parameters.values(), allow_unused=True)
    given = next_token_nll(model, batch)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(given, parameters.values(), allow_unused=True)
    assert any(value is not None and value.abs().sum() > 0 for value in expected)
    for name, one, other in zip(parameters, found, expected, strict=True):
        if other is None:
            assert one is None, name
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=f"gradient of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_head_equals_the_models_own_logits(kind: str) -> None:
    assert_equals_own_logits(made(kind), some_batch())


def test_scale_and_cap_are_read_exactly() -> None:
    batch = some_batch()
    assert hidden_of(made("llama"), batch)[1].scale == 1.0
    assert hidden_of(made("cohere"), batch)[1].scale == 0.0625
    assert hidden_of(made("granite", logits_scaling=16.0), batch)[1].scale == 1 / 16
    capped = hidden_of(made("gemma2", final_logit_softcapping=30.0), batch)[1]
    assert (capped.scale, capped.cap) == (1.0, 30.0)


def with_adapter(**config: object) -> Any:
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(made("llama"), LoraConfig(**{**chosen, **config}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_lora_on_the_head_is_a_second_factor() -> None:
    model = with_adapter(target_modules=["q_proj", "lm_head"])
    _, head = hidden_of(model, some_batch())
    assert [weight.shape for _, weight in head.factors] == [(90, 32), (90, 4)]
    assert_equals_own_logits(model, some_batch())


def test_lora_elsewhere_leaves_the_head_frozen() -> None:
    model = with_adapter()
    next_token_nll(model, some_batch()).backward()
    assert model.get_output_embeddings().weight.grad is None
    assert_equals_own_logits(model, some_batch())


def test_a_head_trained_whole_beside_lora() -> None:
    model = with_adapter(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    assert_equals_own_logits(model, some_batch())
    with model.disable_adapter():
        hidden, head = hidden_of(model, some_batch())
        torch.testing.assert_close(full_logits(hidden, head), logits_of(model, some_batch()))


def test_other_adapters_on_the_head_are_refused() -> None:
    with pytest.raises(ModelError, match="not plain LoRA"):
        hidden_of(with_adapter(target_modules=["lm_head"], use_dora=True), some_batch())


def test_what_the_head_can_not_say_is_refused() -> None:
    model = made("llama")

    class Squared(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            answer = model(**inputs)
            answer.logits = answer.logits.square()
            return answer

        def get_output_embeddings(self) -> Any:
            return model.get_output_embeddings()

    with pytest.raises(ModelError, match="neither a scale nor a soft-cap"):
        hidden_of(Squared(), some_batch())


def test_a_forward_pass_that_goes_round_the_head_is_refused() -> None:
    model = made("llama")
    whole = model.get_output_embeddings().weight
    model.forward = lambda **inputs: SimpleNamespace(logits=model.model(inputs["input_ids"])[0] @ whole.T)
    with pytest.raises(ModelError, match="does not call its output embedding"):
        hidden_of(model, some_batch())


def test_a_quantised_head_is_refused() -> None:
    model = made("llama")
    whole = model.get_output_embeddings()

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(90, 32, dtype=torch.uint8), requires_grad=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return whole(hidden)

    model.set_output_embeddings(Quantised())
    with pytest.raises(ModelError, match="Quantised, not a linear layer in floating point"):
        hidden_of(model, some_batch())


def test_the_model_is_as_it_was_even_after_a_failure() -> None:
    model = made("llama")
    batch = some_batch()
    before = logits_of(model, batch)
    with pytest.raises(IndexError):
        hidden_of(model, {**batch, "input_ids": batch["input_ids"] + 1000})
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks and not head._forward_hooks
    torch.testing.assert_close(logits_of(model, batch), before, rtol=0, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = made("llama").train()
    batch = some_batch()

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(next_token_nll(model, batch), list(model.parameters())))

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast_logits_are_float32() -> None:
    """Nearer to the exact loss than logits in bfloat16 are; the setting for products is put back."""
    model, batch = made("llama").eval(), some_batch()
    exact = next_token_nll(model, batch)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        hidden, head = hidden_of(model, batch)
    assert head.operand == torch.bfloat16
    labels = batch["labels"]
    nll = chunked_nll(predicting(hidden, labels), head, counted(labels, labels))
    assert nll.dtype == torch.float32 and setting.fp32_precision == before
    assert nll.item() == pytest.approx(exact.item(), rel=1e-2)


def test_a_model_in_bfloat16_equals_the_same_numbers_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=draw).bfloat16().requires_grad_()
    gold = torch.randint(0, 50, (20,), generator=draw)
    nll = chunked_nll(hidden, Head(((lambda h: h, weight),)), gold, chunk_rows=7)
    wanted = cross_entropy(hidden.double() @ weight.double().T, gold, reduction="sum")
    assert nll.item() == pytest.approx(wanted.item(), rel=1e-6)
    expected = torch.autograd.grad(wanted, (hidden, weight))
    for one, other in zip(torch.autograd.grad(nll, (hidden, weight)), expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() <= 5e-3 * other.norm()


def test_blocks_of_a_half_precision_head_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundation.chunked.BLOCK_BYTES", 16 * 4 * 7)  # seven rows of W at a time
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 16, generator=draw), torch.randn(50, 16, generator=draw).bfloat16()
    product = Product(weight, None, torch.float32)
    z, dx, dw = torch.full((9, 50), 9.0), torch.zeros(9, 16), torch.ones(50, 16)
    product.forward(x, z, add=False)
    torch.testing.assert_close(z, x @ weight.float().T)
    product.backward(z, x, dx, dw)
    torch.testing.assert_close(dx, z @ weight.float())
    torch.testing.assert_close(dw, 1 + z.T @ x)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_products_of_mixed_precision(monkeypatch: pytest.MonkeyPatch, stored: torch.dtype) -> None:
    """The path of a GPU, with its one missing call, mm(half, half) -> float32, played on the CPU."""
    plain = torch.mm

    def mixed(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, out: Any = None) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        answer = plain(a.float(), b.float())
        return answer if out is None else out.copy_(answer)

    monkeypatch.setattr(torch, "mm", mixed)
    monkeypatch.setattr("foundation.chunked.BLOCK_BYTES", 16 * 2 * 7)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=draw).bfloat16().to(stored)
    product = Product(weight, torch.bfloat16, torch.float32)
    product.mixed, product.operand = True, torch.bfloat16
    for rows in (1, 9):
        x = product.operands(torch.randn(rows, 16, generator=draw))
        z, dx, dw = torch.zeros(rows, 50), torch.zeros(rows, 16), torch.ones(50, 16)
        product.forward(x, z, add=False)
        torch.testing.assert_close(z, x.float() @ weight.float().T)
        dz = z.bfloat16().float()
        product.backward(z, x, dx, dw)
        torch.testing.assert_close(dx, dz @ weight.float())
        torch.testing.assert_close(dw, 1 + dz.T @ x.float())


def test_packed_rows_equal_rows_apart(tmp_path: Path) -> None:
    """position_ids without an attention mask: transformers keeps the conversations of a row apart."""
    folder = tiny_model(tmp_path)
    rows, *_ = chat_rows((chat["messages"] for chat in chats(3)), Tokenizer(folder), 100)
    model = create(
        {**SHAPE, "model_type": "llama", "vocab_size": 400, "max_position_embeddings": 128}, 0
    ).eval()
    apart = next_token_nll(model, collate(rows, 0))
    packed = {
        "input_ids": torch.cat([torch.from_numpy(row["input_ids"]) for row in rows])[None],
        "labels": torch.cat([torch.from_numpy(row["labels"]) for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }
    torch.testing.assert_close(next_token_nll(model, packed), apart)
