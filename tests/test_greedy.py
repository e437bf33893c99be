"""Greedy answers against transformers' own generate, one prompt at a time and without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reports import StopsOnceTold

from foundation.errors import InputError, ModelError, StopRequested
from foundation.greedy import greedy
from foundation.model import create
from foundation.report import Silent

BASE: dict[str, Any] = {
    "vocab_size": 48,
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.5,  # so that every layer changes the answers, and first choices are clear
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, **MIXED},
    "qwen3": {"sliding_window": 5, "use_sliding_window": True, **MIXED},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 4, "final_logit_softcapping": 30.0, **MIXED},
}
ANSWER_TOKENS = 9


def random_model(family: str, **changes: Any) -> Any:
    return create({"model_type": family, **BASE, **FAMILIES[family], **changes}, 1).eval()


def random_prompts() -> list[list[int]]:
    """Shorter and longer than the windows, and two of one length."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 48, (n,), generator=generator).tolist() for n in (3, 12, 7, 1, 12, 5, 9)]


def by_transformers(model: Any, prompts: list[list[int]], stop_ids: frozenset[int]) -> list[list[int]]:
    """The same answers from `generate`, cut before the id that stopped them."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=True,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        answers.append(found[:-1] if found[-1] in stop_ids else found)
    return answers


def stops(answers: list[list[int]]) -> frozenset[int]:
    """Two ids that end some of these answers early, one of them at once."""
    return frozenset({answers[1][0], answers[4][3]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_are_those_of_transformers(family: str, attention: str) -> None:
    model, prompts = random_model(family), random_prompts()
    model.set_attn_implementation(attention)
    free = by_transformers(model, prompts, frozenset())
    assert len({tuple(answer) for answer in free}) > 3
    for stop_ids in (frozenset[int](), stops(free)):
        expected = by_transformers(model, prompts, stop_ids)
        for batch_rows in (1, 3, 16):
            found = greedy(
                model, prompts, answer_tokens=ANSWER_TOKENS, stop_ids=stop_ids, pad_id=0, report=Silent(),
                batch_rows=batch_rows,
            )  # fmt: skip
            assert found == expected
    lengths = [len(answer) for answer in expected]
    assert min(lengths) == 0 and max(lengths) == ANSWER_TOKENS and len(set(lengths)) > 2


def test_rows_that_ended_cost_nothing() -> None:
    model, prompts = random_model("llama"), random_prompts()
    free = by_transformers(model, prompts, frozenset())
    stop_ids = stops(free)
    rows = 0

    def count(_: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    handle = model.lm_head.register_forward_pre_hook(count)
    found = greedy(
        model, prompts, answer_tokens=ANSWER_TOKENS, stop_ids=stop_ids, pad_id=0, report=Silent(), batch_rows=4
    )
    handle.remove()
    assert rows == sum(min(len(answer) + 1, ANSWER_TOKENS) for answer in found)


def test_progress_and_stop() -> None:
    report = StopsOnceTold(2)
    with pytest.raises(StopRequested):
        greedy(
            random_model("llama"), random_prompts(), answer_tokens=2, stop_ids=frozenset(), pad_id=0,
            report=report, batch_rows=3,
        )  # fmt: skip
    assert report.said == [(3, 7, "prompt"), (6, 7, "prompt")]


def test_refused() -> None:
    model = random_model("llama")
    chosen: dict[str, Any] = {"stop_ids": frozenset(), "pad_id": 0, "report": Silent()}
    assert greedy(model, [], answer_tokens=4, **chosen) == []
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        greedy(model, [[3], []], answer_tokens=4, **chosen)
    assert len(greedy(model, [[3] * 60], answer_tokens=4, **chosen)[0]) == 4
    with pytest.raises(ModelError, match=r"65 tokens .* \(60\) .* \(5\); the model's context has 64"):
        greedy(model, [[3] * 60], answer_tokens=5, **chosen)
