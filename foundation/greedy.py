"""Greedy generation in torch: a model goes on from prompts and takes its first choice at every step.

Prompts of like length go together, padded on the left as transformers pads them. The model's own forward pass
builds masks, positions and windows for its own cache, so nothing of a family is repeated here. `go_on` is the
loop alone, for those who read the prompts in another way (leave-one-out generation in prune).

Not here: sampling, texts (an answer is ids), and GGUF files (llama.py answers from those).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from foundation.errors import InputError, ModelError
from foundation.report import Report, stop_if_asked
from foundation.rows import longest_first

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    answer_tokens: int,
    stop_ids: frozenset[int],
    pad_id: int,
    report: Report,
    batch_rows: int = 16,
) -> list[list[int]]:
    """The answer to each prompt: up to `answer_tokens` ids, ending before the first of `stop_ids`.

    `model` is in evaluation mode. Raises as `check_prompts` does, and StopRequested between batches.
    """
    import torch
    from transformers import DynamicCache

    check_prompts(model, prompts, answer_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for rows in longest_first([len(prompt) for prompt in prompts], batch_rows):
        stop_if_asked(report)
        with torch.inference_mode():
            batch = left_padded([prompts[row] for row in rows], pad_id, model.device)
            cache = DynamicCache(config=model.config)
            found = go_on(
                model,
                cache,
                next_logits(model, batch, cache),
                batch["attention_mask"],
                answer_tokens=answer_tokens,
                stop_ids=stop_ids,
                keep=cache.batch_select_indices,
            )
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        done += len(rows)
        report.progress(done, len(prompts), "prompt")
    return answers


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], answer_tokens: int) -> None:
    """Raise InputError for an empty prompt, ModelError where a prompt and its answer exceed the context."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} has no tokens", hint="an answer needs something to go on from")
    longest = max(map(len, prompts), default=0)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest + answer_tokens > context:
        raise ModelError(
            f"{longest + answer_tokens} tokens are needed for the longest prompt ({longest}) and its answer "
            f"({answer_tokens}); the model's context has {context}",
            hint="fewer examples in the prompt, or shorter answers",
        )


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and position_ids [B, T]; a row's first real token has position 0."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + [*map(int, prompt)] for prompt in prompts])  # [B, T]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # [B, T]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in named.items()}


def next_logits(model: Any, batch: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
    """What the model thinks of the token after each row; `cache` takes in the rows.  # [B, V]"""
    logits: torch.Tensor = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def go_on(
    model: Any,
    cache: Any,
    logits: torch.Tensor,
    mask: torch.Tensor,
    *,
    answer_tokens: int,
    stop_ids: frozenset[int],
    keep: Callable[[torch.Tensor], None],
) -> list[list[int]]:
    """The answers of R rows whose prompts `cache` holds: mask [R, T] of the prompts, logits [R, V] after them.

    A row leaves the batch as soon as it is answered: `keep` is called with the places [r] of those that stay,
    and drops the others from the cache. Copying what stays costs no more than the cache's growing by one
    token does, which copies it too. Use inside torch.inference_mode().
    """
    import torch

    answers: list[list[int]] = [[] for _ in range(len(logits))]
    rows = list(range(len(logits)))
    while True:
        tokens = logits.argmax(-1)  # [R]
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token in stop_ids:
                continue
            answers[row].append(token)
            if len(answers[row]) < answer_tokens:
                going.append(place)
        if not going:
            return answers
        if len(going) < len(rows):
            places = torch.tensor(going, device=tokens.device)
            keep(places)
            rows, tokens, mask = [rows[place] for place in going], tokens[places], mask[places]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)  # [R, T + 1]
        positions = mask.sum(1, keepdim=True) - 1  # [R, 1]
        step = {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": positions}
        logits = next_logits(model, step, cache)
