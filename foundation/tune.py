"""The one training loop: transformers' Trainer, given a loss and an order of rows.

DDP, FSDP, mixed precision, 8-bit optimisers, gradient accumulation and checkpoints come from Trainer and
accelerate; what is ours is small: batches at an exact position, a loss normalised over the whole optimiser
step, checkpoints that count only when complete, and progress to a Report. Killed at any moment, the next
call goes on from the last complete checkpoint and ends with the same bytes (on CPU).
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from foundation.errors import MissingError, ModelError, StopRequested
from foundation.files import read_json, write_json
from foundation.model import quiet_transformers
from foundation.report import Report
from foundation.rows import Endless, Row, Rows, collate
from foundation.settings import StageSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Batch = dict[str, "torch.Tensor"]
Loss = Callable[["PreTrainedModel", Batch, "torch.Tensor"], "torch.Tensor"]
"""loss(model, batch, items) -> scalar: the SUM over the batch's counted tokens divided by `items`, the number
of counted tokens in the whole optimiser step (all micro-batches, all ranks). A mean per micro-batch would
weigh tokens by the length of their neighbours under gradient accumulation."""

Beta = Annotated[float, Field(ge=0, lt=1)]
COMPLETE = "COMPLETE"
KEPT_CHECKPOINTS = 2


class TuneSettings(StageSettings):
    """Settings shared by every stage that trains."""

    steps: int = Field(100, ge=1, le=10**8, description="optimiser steps")
    batch_rows: int = Field(16, ge=1, description="rows in one forward pass, on each device")
    accumulation: int = Field(1, ge=1, description="forward passes for one optimiser step")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    warmup_steps: int = Field(30, ge=0, description="steps from zero to the peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after the warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW betas", strict=False)
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 = not clipped")
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="the 8-bit forms need bitsandbytes"
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast of the forward pass")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more compute")
    checkpoint_every_steps: int = Field(
        200,
        ge=1,
        description="steps between checkpoints",
        json_schema_extra={"fingerprint": False},  # it can not alter the bytes
    )


def tune(
    model: PreTrainedModel,
    rows: Rows[Row],
    loss: Loss,
    settings: TuneSettings,
    work: Path,
    report: Report,
    *,
    pad_id: int,
) -> dict[str, float | int]:
    """Train `model` in place for settings.steps; resume from `work` if it holds a complete checkpoint.

    Only parameters that require gradients are trained. Returns the loss over the last tenth of the steps
    (nats per counted token) and what was trained. Raises StopRequested after saving a
    checkpoint when the report asks to stop, ModelError when the loss is no longer finite.
    """
    transformers = quiet_transformers()
    if "8bit" in settings.optimizer and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            f"optimizer = {settings.optimizer!r} needs bitsandbytes, which is not installed",
            hint="pip install -c constraints.txt bitsandbytes, or optimizer = 'adamw_torch'",
        )
    work.mkdir(parents=True, exist_ok=True)
    watcher = _watcher(transformers, settings, work, report)
    arguments = _arguments(transformers, settings, work)
    per_step = settings.batch_rows * settings.accumulation * arguments.world_size
    trainer = _trainer(transformers, loss, watcher)(
        model=model,
        args=arguments,
        train_dataset=Endless(rows, settings.steps * per_step, settings.seed),
        data_collator=lambda picked: collate(picked, pad_id),
        callbacks=[watcher],
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    latest = _latest_checkpoint(work)
    if latest is not None:
        report.note(f"going on from {latest.name}")
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    if watcher.stopped:
        raise StopRequested("stopped as asked, after a checkpoint", hint="the same command goes on from here")
    model.eval()
    history = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    last = [value for step, value in history if step > settings.steps * 0.9] or [history[-1][1]]
    return {
        "loss": sum(last) / len(last),
        "steps": settings.steps,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _arguments(transformers: Any, settings: TuneSettings, work: Path) -> Any:
    import torch

    return transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_rows,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        max_grad_norm=settings.clip_norm,
        optim=settings.optimizer,
        bf16=settings.precision == "bf16",
        save_strategy="steps",
        save_steps=settings.checkpoint_every_steps,
        save_total_limit=None,  # old ones go in _watcher, after the new one is known to be complete
        logging_steps=min(10, settings.steps),
        logging_nan_inf_filter=False,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )


def _trainer(transformers: Any, loss: Loss, watcher: Any) -> Any:
    """Trainer with our loss, and rows in the order in which they come; `watcher` hears of every token."""
    from torch.utils.data import SequentialSampler

    class Tuner(transformers.Trainer):
        loss_is_scaled_for_ga = True

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of the whole step

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            watcher.tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
            value = loss(model, inputs, num_items_in_batch)
            # DDP averages gradients over ranks; num_items_in_batch already spans all of them.
            return value * self.accelerator.num_processes

    return Tuner


def _watcher(transformers: Any, settings: TuneSettings, work: Path, report: Report) -> Any:
    """Progress, stop requests, complete checkpoints, and the check that the loss is finite."""

    class Watcher(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.stopped = False
            self.figures: dict[str, float] = {}
            self.tokens, self.started = 0, 0.0  # tokens read since then, padding included

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            pace = self.tokens / max(time.monotonic() - self.started, 1e-9)
            report.progress(state.global_step, settings.steps, "step", tokens_per_second=pace, **self.figures)
            if report.checkpoint_requested():
                control.should_save = True
            if report.stop_requested() and state.global_step < settings.steps:
                self.stopped = control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise ModelError(
                        f"the loss is {logs['loss']} at step {state.global_step}",
                        hint="lower learning_rate, lengthen warmup_steps, or use precision = 'fp32'",
                    )
                self.figures = {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                seal(work / f"checkpoint-{state.global_step}")
                for old in _complete_checkpoints(work)[:-KEPT_CHECKPOINTS]:
                    shutil.rmtree(old)

    return Watcher()


def seal(checkpoint: Path) -> None:
    """Write COMPLETE, the sizes of all files, once these are on the disk itself and not in its cache."""
    sizes = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    write_json(checkpoint / COMPLETE, sizes)


def _is_whole(checkpoint: Path) -> bool:
    """True when COMPLETE is there and every file has the size that it had then."""
    sizes = read_json(checkpoint / COMPLETE)
    return isinstance(sizes, dict) and all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )


def _complete_checkpoints(work: Path) -> list[Path]:
    """Checkpoints that were written to their end and are still whole, oldest first."""
    whole = (path for path in work.glob("checkpoint-*") if _is_whole(path))
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def _latest_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint; torn and damaged ones are removed."""
    complete = _complete_checkpoints(work)
    for torn in set(work.glob("checkpoint-*")) - set(complete):
        shutil.rmtree(torn)
    return complete[-1] if complete else None
