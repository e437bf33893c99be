"""Greedy answers of a model and of all its leave-one-out variants at once, for generation tasks (LayerKD).

Without layer i, layers 0 .. i - 1 see a prompt as they always do: their outputs, keys and values are those of
the whole model. So a layer reads the prompts once for the whole model and once for every variant that left out
an earlier one, L + L(L-1)/2 passes in place of L*L. After its first token every variant has a context of its
own; from there on all go through each layer as one batch, except that the rows of variant j go past layer j.

The model's own forward pass is used throughout, with its masks, positions, windows, norm and head; only its
layers are led around (`_led`). So a family needs no line here, and the answers are those of the cut checkpoint.
What is not shared: the keys and values of prompts while decoding, which are copied for each variant.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foundation.files import read_json, write_json, writing
from foundation.greedy import check_prompts, go_on, left_padded, next_logits
from foundation.report import Report, stop_if_asked
from foundation.rows import longest_first

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Layer = Callable[..., "torch.Tensor"]
Lead = Callable[..., "torch.Tensor"]
"""lead(index, layer, hidden, **beside) -> hidden: stands in for layer `index`, and may call it."""


class Passes(NamedTuple):
    """Work done in layers. Decoding reads a layer's weights once a call, whatever the number of rows."""

    prefill: int  # one batch of prompts through one layer
    decode: int  # one call of one layer at one step of decoding, for the newest token of any number of rows


class Generated(NamedTuple):
    """Answers in the order of the prompts, without the id that stopped them."""

    whole: list[list[int]]  # [prompts]
    without: list[list[list[int]]]  # [L][prompts]
    passes: Passes
    naive_passes: Passes  # of L + 1 models, each generating for the same batches alone


def generate_without(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    answer_tokens: int,
    stop_ids: frozenset[int],
    pad_id: int,
    report: Report,
    batch_rows: int = 8,
    variants_at_once: int = 0,
    work: Path,
    identity: str,
) -> Generated:
    """Greedy answers of up to `answer_tokens` ids of `model`, in evaluation mode, and without each layer.

    `variants_at_once` is how many models decode together, the whole one counting as one of them; 0 is all.
    With g of them, B = batch_rows, T and A tokens of prompt and answer, L layers, H key-value heads of width d,
    model width D and V tokens in the vocabulary, so many numbers are held at most, beside the model and what
    one layer needs for one batch:

        2LHd * B * (g * (T + A) + T)  keys and values; less in decoding where layers have a sliding window
        + 2Hd * B * g * (T + A)       one layer's once more, while it grows
        + L * B * T * D               what each layer was given by the whole model
        + g * B * V                   logits

    Every batch of prompts is written under `work` when it is answered, so a kill costs one batch; `identity`
    names the model, and what was written for another one, or for other prompts or limits, is not read.
    Raises as `check_prompts` does, StopRequested, and RunError where `work` can not be written.
    """
    import torch

    check_prompts(model, prompts, answer_tokens)
    layers = len(model.model.layers)
    asked = [identity, answer_tokens, sorted(stop_ids), pad_id, batch_rows, [[*map(int, p)] for p in prompts]]
    folder = work / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(layers + 1)]
    spent, naive = Passes(0, 0), Passes(0, 0)
    done = 0
    for number, rows in enumerate(longest_first([len(prompt) for prompt in prompts], batch_rows)):
        path = folder / f"{number:06}.json"
        if (record := read_json(path)) is None:
            with torch.inference_mode():
                batch = _Prompts(model, [prompts[row] for row in rows], pad_id)
                record = _answered(batch, variants_at_once or layers + 1, answer_tokens, stop_ids, report)
            write_json(path, record)
        for own, found in zip(answers, record["answers"], strict=True):
            for row, answer in zip(rows, found, strict=True):
                own[row] = answer
        spent = _sum(spent, record["passes"])
        naive = _sum(naive, _naive(record["answers"], answer_tokens))
        done += len(rows)
        report.progress(done, len(prompts), "prompt")
    return Generated(answers[layers], answers[:layers], spent, naive)


def _answered(
    batch: _Prompts, together: int, answer_tokens: int, stop_ids: frozenset[int], report: Report
) -> dict[str, Any]:
    """{"answers": [L + 1][B], "passes": [prefill, decode]} of one batch; the whole model is variant L."""
    answers: list[list[list[int]]] = []
    decode = 0
    total = len(batch.layers) + 1
    for start in range(0, total, together):
        stop_if_asked(report)
        variants = _Variants(batch, range(start, min(start + together, total)))
        with _led(batch.layers, variants.lead):
            found = go_on(
                batch.model,
                variants.cache,
                variants.logits,
                batch.rows["attention_mask"].repeat(len(variants.left_out), 1),
                answer_tokens=answer_tokens,
                stop_ids=stop_ids,
                keep=variants.keep,
            )
        answers += [found[at : at + batch.count] for at in range(0, len(found), batch.count)]
        decode += variants.passes
    return {"answers": answers, "passes": [batch.passes, decode]}


def _naive(answers: Sequence[Sequence[Sequence[int]]], answer_tokens: int) -> Passes:
    """What the same batch costs L + 1 models that know nothing of each other; answers are [L + 1][B].

    A row's first token comes from reading its prompt; a stop id costs a step as any other token.
    """
    layers = len(answers) - 1
    deep = [layers - 1] * layers + [layers]  # [L + 1]
    steps = [max(min(len(answer), answer_tokens - 1) for answer in own) for own in answers]  # [L + 1]
    return Passes(sum(deep), sum(n * depth for n, depth in zip(steps, deep, strict=True)))


def _sum(one: Passes, other: Sequence[int]) -> Passes:
    return Passes(one.prefill + other[0], one.decode + other[1])


@contextmanager
def _led(layers: Sequence[Any], lead: Lead) -> Iterator[None]:
    """Inside the block the model's forward pass calls lead(index, layer, ...) in place of each layer."""
    before = [vars(layer).get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = partial(lead, index, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


class _Prompts:
    """A batch of prompts [B, T] as the whole model read it, from which any variant can read on."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.model = model
        self.layers = list(model.model.layers)
        self.count = len(prompts)
        self.rows = left_padded(prompts, pad_id, model.device)
        self.passes = 0
        self.inputs: list[torch.Tensor] = []  # [L] of [B, T, D]
        self.cache, self.logits = self._read(self._keeping)

    def without(self, layer: int) -> tuple[list[Any], torch.Tensor]:
        """([L] cache layers, logits [B, V]) of the model without `layer`; cache layers up to it are empty."""
        if layer == len(self.layers):
            return [], self.logits
        cache, logits = self._read(partial(self._leaving_out, layer))
        return cache.layers, logits

    def _read(self, lead: Lead) -> tuple[Any, torch.Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with _led(self.layers, lead):
            return cache, next_logits(self.model, self.rows, cache)

    def _keeping(self, _: int, layer: Layer, hidden: torch.Tensor, **beside: Any) -> torch.Tensor:
        self.inputs.append(hidden)
        self.passes += 1
        return layer(hidden, **beside)

    def _leaving_out(
        self, left_out: int, index: int, layer: Layer, hidden: torch.Tensor, **beside: Any
    ) -> torch.Tensor:
        if index <= left_out:
            return self.inputs[left_out]  # what the whole model had there, and what the next layer now gets
        self.passes += 1
        return layer(hidden, **beside)


class _Variants:
    """Variants of one batch that decode together: R rows, variant after variant, fewer as answers end.

    `passes` counts calls of a layer.
    """

    def __init__(self, batch: _Prompts, left_out: Sequence[int]) -> None:
        import torch
        from transformers import Cache

        self.left_out = left_out
        self.passes = 0
        self.of_row = [variant for variant in left_out for _ in range(batch.count)]  # [R]
        read = {variant: batch.without(variant) for variant in left_out}
        self.logits = torch.cat([read[variant][1] for variant in left_out])  # [R, V]
        self.cache: Any = Cache(layers=[])
        for index, shared in enumerate(batch.cache.layers):
            own = [
                read[variant][0][index] if variant < index else shared
                for variant in left_out
                if variant != index
            ]
            joined = copy.copy(shared)  # with its length, which is more than it holds where there is a window
            if own:
                joined.keys = torch.cat([part.keys for part in own])
                joined.values = torch.cat([part.values for part in own])
            else:
                _vacate(joined)
            self.cache.layers.append(joined)
            for variant in left_out:
                if variant < index:
                    read[variant][0][index].reset()

    def lead(self, index: int, layer: Layer, hidden: torch.Tensor, **beside: Any) -> torch.Tensor:
        """The output [R, 1, D] of layer `index`: rows of the variant without it go past."""
        import torch

        start, end = self._past(index)
        rows = len(hidden)
        if end - start == rows:
            nothing = hidden.new_zeros(1, 1, 1, 1)
            self.cache.update(nothing, nothing, index)
            return hidden
        self.passes += 1
        if start == end:
            return layer(hidden, **beside)

        def through(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(through, value))
            of_rows = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == rows
            return torch.cat([value[:start], value[end:]]) if of_rows else value

        out = layer(through(hidden), **{name: through(value) for name, value in beside.items()})
        return torch.cat([out[:start], hidden[start:end], out[start:]])

    def keep(self, places: torch.Tensor) -> None:
        """Drop all rows but those at `places`, which rise."""
        kept = places.tolist()
        for index, part in enumerate(self.cache.layers):
            start, end = self._past(index)
            if end - start == len(self.of_row):
                continue
            held = [place if place < start else place - (end - start) for place in kept
                    if not start <= place < end]  # fmt: skip
            if held:
                part.batch_select_indices(places.new_tensor(held))
            else:
                _vacate(part)
        self.of_row = [self.of_row[place] for place in kept]

    def _past(self, index: int) -> tuple[int, int]:
        """Rows start .. end go past layer `index`; empty at 0 where none does."""
        count = self.of_row.count(index)
        start = self.of_row.index(index) if count else 0
        return start, start + count


def _vacate(part: Any) -> None:
    """A cache layer that no row goes through holds one narrow row of zeros.

    Masks for all layers of a kind are made to the length of the first one's cache, so it must keep count.
    """
    part.keys = part.keys.new_zeros(1, 1, part.keys.shape[2], 1)
    part.values = part.keys
