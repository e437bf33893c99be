"""Teachers on this machine: a Hugging Face folder through transformers, a GGUF through llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.synthesize.asks import Ask, Reply
from foundation.chat import Chat, ChatTemplate
from foundation.files import DigestCache
from foundation.gguf_header import find
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class TransformersTeacher:
    """A Teacher. Asks of similar length go through the model together, `batch` at a time.

    Padding changes the last bits of a logit, so an answer can depend on its neighbours: `independent` is
    False. The draws do not: each answer has its own generator, seeded by its ask.
    """

    independent = False

    def __init__(self, folder: Path, batch: int) -> None:
        """Raises ModelError as foundation.model.load does, and for a model without a chat template."""
        from foundation.model import context_tokens, load

        self.identity = DigestCache().content(folder)
        self._tokenizer = Tokenizer(folder)
        self._chat = Chat(self._tokenizer)
        self._model = load(folder)
        self._batch = batch
        self._context = context_tokens(folder)
        self._ends = _ends(self._model, self._tokenizer)

    def close(self) -> None:
        del self._model

    def answers(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> Iterator[tuple[int, Reply]]:
        prompts = [self._chat.prompt_ids(list(ask.messages)) for ask in asks]
        fitting = []
        for index, (prompt, ask) in enumerate(zip(prompts, asks, strict=True)):
            if fault := _too_long(len(prompt), ask, self._context):
                yield index, Reply("", fault=fault)
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: (len(prompts[index]), index))
        for start in range(0, len(fitting), self._batch):
            if stop():
                return
            chosen = fitting[start : start + self._batch]
            answers = self._generate([prompts[i] for i in chosen], [asks[i] for i in chosen])
            for index, ids in zip(chosen, answers, strict=True):
                cut = len(ids) == asks[index].max_new_tokens and ids[-1] not in self._ends
                kept = [token for token in ids if token not in self._ends]
                yield index, Reply(self._tokenizer.decode(kept), len(prompts[index]), len(ids), cut)

    def _generate(self, prompts: list[list[int]], asks: list[Ask]) -> list[list[int]]:
        """New tokens of each prompt, the end token included where one came."""
        import torch

        longest, pad = max(map(len, prompts)), self._tokenizer.pad_id
        ids = torch.tensor(
            [[pad] * (longest - len(p)) + p for p in prompts], device=self._model.device
        )  # [B, T]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=ids.device)
        config = self._model.generation_config.__class__(  # not the model's own: that may sample in other ways
            max_new_tokens=max(ask.max_new_tokens for ask in asks),
            do_sample=False,
            eos_token_id=self._ends,
            pad_token_id=pad,
        )
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=[_Draw(asks, len(self._tokenizer), ids.device)],
            )
        return [
            _until_end(row[longest : longest + ask.max_new_tokens].tolist(), self._ends)
            for row, ask in zip(out, asks, strict=True)
        ]


class _Draw:
    """A logits processor that leaves one token: drawn with the row's own generator, or the likeliest."""

    def __init__(self, asks: Sequence[Ask], tokens: int, device: torch.device) -> None:
        import torch

        self._asks, self._tokens = asks, tokens
        self._draws = [torch.Generator(device).manual_seed(ask.seed) for ask in asks]

    def __call__(self, ids: Any, scores: torch.Tensor) -> torch.Tensor:  # scores [B, V]
        import torch

        scores = scores.float()
        scores[:, self._tokens :] = -torch.inf  # rows of a padded vocabulary are no tokens
        left = torch.full_like(scores, -torch.inf)
        for row, (ask, draws) in enumerate(zip(self._asks, self._draws, strict=True)):
            if ask.temperature == 0:
                token = scores[row].argmax()
            else:
                token = _drawn(scores[row] / ask.temperature, ask.top_p, draws)
            left[row, token] = 0.0
        return left


def _drawn(logits: torch.Tensor, top_p: float, draws: torch.Generator) -> torch.Tensor:
    """One id from softmax(logits), out of the fewest tokens that reach `top_p`.  # logits [V]"""
    import torch

    probabilities, order = torch.sort(torch.softmax(logits, -1), descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return order[torch.multinomial(probabilities, 1, generator=draws)]


class GgufTeacher:
    """A Teacher. Answers run side by side (continuous batching), each as if it were alone."""

    independent = True

    def __init__(self, path: Path, *, slots: int, context_tokens: int, gpu_layers: int) -> None:
        """`path`: a GGUF file or its folder. `context_tokens` for a prompt with its answer, at most what
        the model was made for.
        """
        from foundation.llama import LlamaModel

        self.identity = DigestCache().content(path)
        self._model = LlamaModel(find(path), gpu_layers=gpu_layers)
        self._template = ChatTemplate(self._model.metadata("tokenizer.chat_template"), path.name)
        self._tokens = min(context_tokens, self._model.trained_context)
        self._context = self._model.context(self._tokens, slots=slots)
        self._slots = slots

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def answers(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> Iterator[tuple[int, Reply]]:
        from foundation.llama import Sampling

        prompts = [self._template.encode(list(ask.messages), self._model, prompt=True) for ask in asks]
        fitting: dict[int, list[int]] = {}  # max_new_tokens -> indices
        for index, (prompt, ask) in enumerate(zip(prompts, asks, strict=True)):
            if fault := _too_long(len(prompt), ask, self._tokens):
                yield index, Reply("", fault=fault)
            else:
                fitting.setdefault(ask.max_new_tokens, []).append(index)
        for most, chosen in sorted(fitting.items()):
            for start in range(0, len(chosen), self._slots):  # so that answers can be kept as they come
                if stop():
                    return
                part = chosen[start : start + self._slots]
                sampling = [Sampling(asks[i].temperature, asks[i].top_p, asks[i].seed) for i in part]
                found = self._context.generate_many([prompts[i] for i in part], most, sampling=sampling)
                for index, ids in zip(part, found, strict=True):
                    text = self._model.detokenize(ids, special=False)
                    yield index, Reply(text, len(prompts[index]), len(ids), len(ids) == most)


def _too_long(prompt_tokens: int, ask: Ask, context: int) -> str:
    if prompt_tokens + ask.max_new_tokens <= context:
        return ""
    return (
        f"context: a prompt of {prompt_tokens} tokens and an answer of {ask.max_new_tokens} "
        f"do not fit {context} tokens"
    )


def _ends(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: what generation_config.json names, and the tokenizer's eos."""
    named = model.generation_config.eos_token_id
    found = named if isinstance(named, list) else [named]
    return sorted({i for i in (*found, tokenizer.eos_id) if i is not None})


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """`ids` up to the first end token, that one included."""
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]
