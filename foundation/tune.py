"""The one training loop: transformers' Trainer, given a loss and an order of rows.

DDP, FSDP, mixed precision, 8-bit optimisers, gradient accumulation and checkpoints come from Trainer and
accelerate; what is ours is small: batches at an exact position, a loss normalised over the whole optimiser
step, checkpoints that count only when complete, curves, and progress to a Report. Killed at any moment, the
next call goes on from the last complete checkpoint and ends with the same bytes (on CPU).

Under torchrun every rank calls `tune`. Rank 0 alone writes curves, seals and removes checkpoints, and hears
the user; what it heard goes to all ranks with the sums of the step, so that none waits for another in vain.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from foundation.adapters import Beside
from foundation.checkpoints import complete_checkpoints, remove_old, remove_torn, seal, step_of
from foundation.curves import CURVES, Curves
from foundation.errors import Diverged, MissingError, StopRequested
from foundation.memory import peak_memory_bytes
from foundation.model import quiet_transformers
from foundation.ranks import is_main, world
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
weigh tokens by the length of their neighbours under gradient accumulation.

A loss may have `sums`, a dict name -> detached scalar that each call adds to, with "tokens", the counted
tokens, among the names: the means a token over an optimiser step are then told beside the loss."""

Order = Callable[[int], Rows[Row]]
"""how many rows are needed -> so many, in the order in which they are trained on"""

SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}  # transformers' names

Beta = Annotated[float, Field(ge=0, lt=1)]


class TuneSettings(StageSettings):
    """Settings shared by every stage that trains."""

    steps: int = Field(100, ge=1, le=10**8, description="optimiser steps")
    batch_rows: int = Field(16, ge=1, description="rows in one forward pass, on each device")
    accumulation: int = Field(1, ge=1, description="forward passes for one optimiser step")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    warmup_steps: int = Field(30, ge=0, description="steps from zero to the peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="after the warm-up; wsd = the peak for long, then a linear decay"
    )
    decay_share: float = Field(0.1, gt=0, le=1, description="share of the steps, the last, that wsd decays in")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW betas", strict=False)
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 = not clipped")
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="the 8-bit forms need bitsandbytes"
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast of the forward pass")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more compute")
    processes: int = Field(
        1, ge=1, le=64, description="processes under torchrun, each with its own GPU and batch_rows"
    )
    checkpoint_every_steps: int = Field(
        200,
        ge=1,
        description="steps between checkpoints",
        json_schema_extra={"fingerprint": False},  # it can not alter the bytes
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> TuneSettings:
        """Refuse a decay that has no schedule, and one that begins before the warm-up ends."""
        if self.schedule != "wsd" and self.changed(["decay_share"]):
            raise ValueError(f"decay_share has no effect with schedule = {self.schedule!r}; set 'wsd'")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and {self.decay_steps} steps of decay (decay_share = "
                f"{self.decay_share}) are more than steps = {self.steps}; shorten one of them"
            )
        return self

    @property
    def decay_steps(self) -> int:
        """How many steps wsd decays over."""
        return max(1, round(self.decay_share * self.steps))


def tune(
    model: PreTrainedModel,
    rows: Rows[Row] | Order,
    loss: Loss,
    settings: TuneSettings,
    work: Path,
    report: Report,
    *,
    pad_id: int,
    undecayed: Collection[str] = (),
) -> dict[str, float | int]:
    """Train `model` in place for settings.steps; resume from `work` if it holds a complete checkpoint.

    `rows` are drawn epoch after epoch, each in its own seeded order; an Order says itself what comes when (a
    mixture). Only parameters that require gradients are trained; those named in `undecayed` without weight
    decay. Writes work/curves.jsonl, a line a step. Returns the loss over the last tenth of the steps (nats per
    counted token) and what was trained. Raises StopRequested after saving a checkpoint when the report asks to
    stop, Diverged when the loss is no longer finite.
    """
    from accelerate import PartialState

    transformers = quiet_transformers()
    if "8bit" in settings.optimizer and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            f"optimizer = {settings.optimizer!r} needs bitsandbytes, which is not installed",
            hint="pip install -c constraints.txt bitsandbytes, or optimizer = 'adamw_torch'",
        )
    if settings.warmup_steps >= settings.steps:
        warmup = f"warmup_steps = {settings.warmup_steps} of {settings.steps} steps"
        report.note(f"{warmup}: the peak learning rate is not reached")
    work.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(transformers, settings, work)
    if is_main():
        remove_torn(work)
    PartialState().wait_for_everyone()
    latest = next(reversed(complete_checkpoints(work)), None)
    watcher = _watcher(transformers, loss, settings, work, report, step_of(latest) if latest else 0)
    needed = settings.steps * settings.batch_rows * settings.accumulation * arguments.world_size
    trainer = _trainer(transformers, loss, watcher, undecayed)(
        model=model,
        args=arguments,
        train_dataset=rows(needed) if callable(rows) else Endless(rows, needed, settings.seed),
        data_collator=lambda picked: collate(picked, pad_id),
        callbacks=[watcher],
    )
    if settings.gradient_checkpointing:
        # Not reentrant: gradients then reach LoRA's weights though the embedding, being frozen, needs none.
        reentrant = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 or so on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=reentrant)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        model.disable_input_require_grads()  # or frozen layers below the first that trains would run twice
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if latest is not None:
        report.note(f"going on from {latest.name}")
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    if watcher.stopped:
        raise StopRequested("stopped as asked, after a checkpoint", hint="the same command goes on from here")
    PartialState().wait_for_everyone()  # rank 0's last line of the curves is written
    model.eval()
    last = Curves.last(work / CURVES, math.ceil(settings.steps / 10))
    return {
        "loss": sum(figures["loss"] for figures in last) / len(last),
        "steps": settings.steps,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _arguments(transformers: Any, settings: TuneSettings, work: Path) -> Any:
    import torch

    decay = {"num_decay_steps": settings.decay_steps, "decay_type": "linear"}
    arguments = transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_rows,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=SCHEDULES.get(settings.schedule, settings.schedule),
        lr_scheduler_kwargs=decay if settings.schedule == "wsd" else {},
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        max_grad_norm=settings.clip_norm,
        optim=settings.optimizer,
        bf16=settings.precision == "bf16",
        save_strategy="steps",
        save_steps=settings.checkpoint_every_steps,
        save_total_limit=None,  # old ones go in _watcher, after the new one is known to be complete
        logging_steps=1,  # a mean over several steps would be another one after a resume between them
        logging_nan_inf_filter=False,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # all that trains is used in every step; looking for it costs time
    )
    if arguments.device.type == "cpu":
        # With several ranks it is "cpu:0", to which torch loads no optimiser state; later Trainers know that,
        # 5.17 does not.
        arguments._setup_devices = torch.device("cpu")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process drives one GPU; Trainer would take all that it sees
    return arguments


def _trainer(transformers: Any, loss: Loss, watcher: Any, undecayed: Collection[str]) -> Any:
    """Trainer with our loss, and rows in the order in which they come; `watcher` hears of every token.

    Its checkpoints hold what trains beside adapters too: those of a PeftModel are the adapters alone.
    """
    from torch.utils.data import SequentialSampler

    class Tuner(transformers.Trainer):
        loss_is_scaled_for_ga = True

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.model_accepts_loss_kwargs = True  # makes Trainer count the labels of the whole step

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name in super().get_decay_parameter_names(model) if name not in undecayed]

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            Beside(self.model).save(Path(output_dir or self.args.output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            Beside(self.model).load(Path(resume_from_checkpoint))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            watcher.tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
            value = loss(model, inputs, num_items_in_batch)
            # DDP averages gradients over ranks; num_items_in_batch already spans all of them.
            return value * self.accelerator.num_processes

    return Tuner


def _watcher(
    transformers: Any, loss: Loss, settings: TuneSettings, work: Path, report: Report, start: int
) -> Any:
    """Curves and progress, stop requests, complete checkpoints, and the check that the loss is finite."""

    class Watcher(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.stopped = False
            self.tokens, self.started = 0, 0.0  # tokens read since then, padding included
            self.curves = Curves(work / CURVES, start) if is_main() else None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """At the end of every step, before Trainer looks at `control`; and once more with a summary."""
            if not logs or "loss" not in logs:
                return
            state.log_history.clear()  # the curves hold it; Trainer writes all of it into each checkpoint
            if not math.isfinite(logs["loss"]):
                raise Diverged(
                    f"the loss is {logs['loss']} at step {state.global_step}",
                    hint="lower learning_rate, lengthen warmup_steps, or use precision = 'fp32'",
                )
            means, save, stop = _agree(loss, report, args.device)
            figures = {"loss": logs["loss"], **means}
            figures |= {name: float(logs[name]) for name in ("grad_norm", "learning_rate")}
            if self.curves:
                self.curves.add({"step": state.global_step, **figures})
            pace = self.tokens / max(time.monotonic() - self.started, 1e-9)
            live = {"tokens_per_second": pace, "peak_memory_bytes": _peak_memory_bytes()}
            report.progress(state.global_step, settings.steps, "step", **figures, **live)
            if save:
                control.should_save = True
            if stop and state.global_step < settings.steps:
                self.stopped = control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            from accelerate import PartialState

            PartialState().wait_for_everyone()  # each rank has written its own part
            if self.curves:
                self.curves.sync()
                seal(work / f"checkpoint-{state.global_step}")
                remove_old(work)

    return Watcher()


def _agree(loss: Loss, report: Report, device: Any) -> tuple[dict[str, float], bool, bool]:
    """(the loss's means a counted token, save?, stop?) of a step, the same on all ranks; empties the sums.

    One reduction for all. Rank 0 alone asks the report: two ranks that read a request between different steps
    would wait for each other for ever.
    """
    import torch

    sums: dict[str, torch.Tensor] = getattr(loss, "sums", {})
    asked = [report.checkpoint_requested(), report.stop_requested()] if is_main() else [False, False]
    told = torch.tensor(asked, dtype=torch.float64, device=device)
    told = torch.cat([told, *(value.double().to(device).reshape(1) for value in sums.values())])
    if world() > 1:
        torch.distributed.all_reduce(told)
    save, stop, *totals = told.tolist()
    total = dict(zip(sums, totals, strict=True))
    sums.clear()
    tokens = max(total.pop("tokens", 0.0), 1.0)
    return {name: value / tokens for name, value in total.items()}, save > 0, stop > 0


def _peak_memory_bytes() -> int:
    """The most memory that this process held so far: the GPU's where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()
