"""Healing: a cut model learns from the model that it was cut from (LayerKD, Kovalev & Tikhomirov 2025).

    layers.py       which layers train and which are compared
    divergence.py   the logit losses: formulas and their gradients
    chunked.py      the same over chunks of positions, so that no logits are held for a batch
    loss.py         both parts together, in the form that the training loop takes

What a layer is worth, and cutting it out, are prune's affair; this room is handed a folder and a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.heal.layers import check_map, layer_outputs, layers_of, neighbours, pairs
from distill.heal.loss import SERVED, HealingLoss
from distill.losses import LOSSES
from distill.store import TopKStore
from foundation.adapters import Lora, merged, taken_off, with_adapters
from foundation.errors import InputError, ModelError
from foundation.healing import HealSettings
from foundation.model import context_tokens, load
from foundation.report import Report
from foundation.rows import Row, Rows
from foundation.tokenizer import Tokenizer
from foundation.tune import tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Healed", "HealingLoss", "heal", "layer_outputs"]


@dataclass(frozen=True)
class Healed:
    """What a healing gives."""

    model: PreTrainedModel  # fp32; with LoRA merged, in the precision of the folder
    changed: tuple[str, ...]  # names of the parameters that trained, sorted; tied ones once, as the embedding
    figures: dict[str, float | int]  # tune's


def heal(
    folder: Path,
    teacher: PreTrainedModel | None,
    kept: Sequence[int],
    gaps: Sequence[int],
    rows: Rows[Row],
    settings: HealSettings,
    work: Path,
    report: Report,
    *,
    pad_id: int,
    store: Path | None = None,
    tokenizer: Tokenizer,
) -> Healed:
    """Train the cut model in `folder` toward `teacher`, or toward a top-K `store` where there is none.

    kept[j] is the teacher's layer that layer j of the cut model was; gap g lies before its layer g (0 ... L).
    Resumes from `work`, and leaves curves.jsonl there. Under torchrun every rank calls this.

    Raises InputError for settings that the store can not serve, ModelError when map, store, vocabulary and
    models do not belong together; Diverged and StopRequested as `tune` does.
    """
    if (store is None) == (teacher is None):
        raise InputError("healing needs one teacher: a live model, or a store")
    if store is not None and (problems := settings.refused_by_a_store()):
        raise InputError("\n".join(problems))
    student = _loaded(folder, settings, report)
    check_map(kept, gaps, len(layers_of(student)), None if teacher is None else len(layers_of(teacher)))
    trained = _choose(student, gaps, settings)
    if store is not None:
        opened = TopKStore(store)
        supports = {name: LOSSES[served].support for name, (served, _) in SERVED.items()}
        opened.check_student(folder, "logit_loss", settings.logit_loss, supports)
        rows = opened.beside(rows, tokenizer, temperature=1.0)
    if teacher is not None:
        teacher.requires_grad_(False).eval()
    depth = kept[-1] + 1 if teacher is None else len(layers_of(teacher))
    loss = HealingLoss(settings, student, teacher, pairs(settings.hidden_loss, trained, kept, depth))
    figures = tune(student, rows, loss, settings, work, report, pad_id=pad_id)
    if settings.trains != "lora":
        changed = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        return Healed(student, tuple(sorted(changed)), figures)
    adapters = taken_off(student)
    del student, loss  # their memory is wanted for the model as it is stored
    return Healed(merged(folder, adapters), tuple(sorted(f"{name}.weight" for name in adapters)), figures)


def _loaded(folder: Path, settings: HealSettings, report: Report) -> Any:
    """The cut model in fp32, with adapters where those are what trains."""
    if settings.trains != "lora":
        return load(folder)
    lora = Lora(settings.lora_rank, settings.lora_alpha, settings.seed)
    # peft, since unsloth replaces forward passes that the hidden states and the head are read from.
    return with_adapters(folder, lora, "fp32", "peft", max_tokens=context_tokens(folder), report=report)


def _choose(student: Any, gaps: Sequence[int], settings: HealSettings) -> list[int]:
    """Say which weights train, and which layers have some of them: all, or the neighbours of the gaps."""
    layers = layers_of(student)
    if settings.trains == "neighbours":
        trained = neighbours(gaps, len(layers))
        if not trained:
            raise ModelError(
                "trains = 'neighbours', and no layer was removed: nothing would train",
                hint="name the gaps, or set trains = 'all'",
            )
        student.requires_grad_(False)
        for layer in trained:
            layers[layer].requires_grad_(True)
        return trained
    if settings.trains == "all" and settings.logit_loss == "none":
        _freeze_head(student)
    return list(range(len(layers)))


def _freeze_head(student: Any) -> None:
    """Without a logit loss nothing reaches final norm and head (unless tied), and DDP waits for what trains."""
    student.get_decoder().norm.requires_grad_(False)
    if student.get_output_embeddings().weight is not student.get_input_embeddings().weight:
        student.get_output_embeddings().requires_grad_(False)
