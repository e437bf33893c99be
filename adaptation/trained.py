"""Which weights of a model train in continued pre-training, and how they come back into one model.

    embeddings   the input embeddings [V, D], whole or the rows of new tokens alone
    head         the LM head [V, D], likewise; in a tied model the same matrix
    layers       everything else
    lora         adapters beside everything else, which stays as it is (foundation/adapters.py)

Embeddings and head together are LEP's way (arXiv 2412.21140, section 3), with the layers they are Vikhr's, with
LoRA that of later RuAdapt. Beside LoRA the two matrices train themselves, in float32 whatever the base is held
in, and not copies of them as peft's modules_to_save would: those untie a tied model.

Where new rows alone train, the others keep their bytes: their gradient is zero before it is clipped, so Adam's
moments are zero as well, and the matrix has no weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adaptation.weights import not_finite
from foundation.adapters import Beside, Lora, merged, taken_off, with_adapters
from foundation.errors import ModelError
from foundation.model import Precision, load
from foundation.report import Report
from foundation.tensors import HEAD, TensorFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Part = Literal["embeddings", "head", "layers", "lora"]
VOCABULARY: tuple[Part, ...] = ("embeddings", "head")


def made_ready(
    folder: Path,
    parts: Sequence[Part],
    lora: Lora,
    base_precision: Precision,
    *,
    max_tokens: int,
    report: Report,
) -> Any:
    """The model in `folder`, of which `parts` require gradients. Raises ModelError for numbers not finite."""
    adapted = "lora" in parts
    if adapted:  # peft, since unsloth's attention does not see where a document ends
        model = with_adapters(folder, lora, base_precision, "peft", max_tokens=max_tokens, report=report)
    else:
        model = load(folder)
        model.requires_grad_("layers" in parts)
    refuse_not_finite(model, folder)
    tied = is_tied(model)
    chosen = [part for part in VOCABULARY if part in parts]
    if tied and len(chosen) == 1:
        report.note(f"embeddings and head are one matrix in this model: with the {chosen[0]} both train")
    for part, module in _vocabulary(model).items():
        trains = part in chosen or (tied and bool(chosen))
        module.requires_grad_(trains)
        if trains and adapted and base_precision != "fp32":
            _in_float32(module, part, folder, tied)
    return model


def train_rows(model: Any, rows: Sequence[int]) -> list[str]:
    """Let `rows` alone of the trained vocabulary matrices move; returns the names of these matrices."""
    held = set()
    for module in _vocabulary(model).values():
        for parameter in module.parameters():  # a head may have a bias [V]
            if parameter.requires_grad and id(parameter) not in held:
                held.add(id(parameter))
                _hold_others(parameter, rows)
    return [name for name, parameter in model.named_parameters() if id(parameter) in held]


def _hold_others(parameter: torch.Tensor, rows: Sequence[int]) -> None:
    """Make the gradient of all rows but `rows` zero."""
    import torch

    others = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)  # [V]
    others[list(rows)] = False
    mask = others.view(-1, *[1] * (parameter.dim() - 1))
    parameter.register_hook(lambda gradient: gradient.masked_fill(mask, 0.0))


class Trained:
    """What a model with adapters learnt, apart from its base: adapters and whole matrices, on the CPU."""

    def __init__(self, model: Any) -> None:
        self.adapters = taken_off(model)
        self.matrices = {
            name.removeprefix("base_model.model."): value.detach().cpu()
            for name, value in Beside(model).matrices.items()
        }

    def on(self, folder: Path) -> PreTrainedModel:
        """The model in `folder` with all of it, each number rounded once, to the precision stored there."""
        import torch

        model = merged(folder, self.adapters)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.matrices.items():
                parameters[name].copy_(value)
        return model


def is_tied(model: Any) -> bool:
    """True when the LM head is the matrix of the input embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def refuse_not_finite(model: Any, folder: Path) -> None:
    """Raise ModelError when a weight is NaN or infinite: one such number makes every loss NaN."""
    for name, parameter in model.named_parameters():
        if bad := not_finite(parameter.detach()):
            raise ModelError(
                f"{folder}: {bad} of {parameter.numel()} numbers in {name} are NaN or infinite",
                hint="go back to the last model that was whole; the training that made this one diverged",
            )


def _vocabulary(model: Any) -> dict[Part, Any]:
    return {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}


def _in_float32(module: Any, part: Part, folder: Path, tied: bool) -> None:
    """Give a matrix beside a base in half precision or in 4 bits float32, as the files have it.

    What stands around it goes on computing in bf16.
    """
    import torch

    module.float()
    files = TensorFiles(folder)
    name = files.embedding() if part == "embeddings" or tied else HEAD
    with torch.no_grad():
        module.weight.copy_(files.read(name))
    if part == "embeddings":
        module.register_forward_hook(lambda _, __, output: output.bfloat16())
    else:
        module.register_forward_pre_hook(lambda _, args: (args[0].to(module.weight.dtype), *args[1:]))
