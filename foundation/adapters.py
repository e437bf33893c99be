"""LoRA and QLoRA (Hu et al. 2021; Dettmers et al. 2023): small matrices beside a frozen base, merged last.

    W' = W + alpha / rank * B A        A [r, D_in], B [D_out, r], trained in float32

The base may be in 4 bits while it is trained against, but nothing is merged into that: the adapters are taken
off, the base is read again as it is stored, and the sum, made in float32, is rounded once to the stored
precision. (peft's merge_and_unload leaves a 4-bit base in 4 bits, and rounds twice where the base is in bf16.)
Embedding and head get no adapters, so tied ones stay tied. They may train whole beside them (adaptation).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation.errors import MissingError, ModelError
from foundation.files import write_json
from foundation.model import Precision, check_files, load
from foundation.report import Report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Backend = Literal["auto", "peft", "unsloth"]


@dataclass(frozen=True)
class Lora:
    """What the adapters are like. scale = alpha / rank; ends: on the first and the last layer alone."""

    rank: int
    alpha: int
    seed: int
    ends: bool = False

    def layers(self, model: Any) -> list[int] | None:
        """Numbers of the layers that get adapters; None = all."""
        return sorted({0, model.config.get_text_config().num_hidden_layers - 1}) if self.ends else None


def with_adapters(
    folder: Path, lora: Lora, precision: Precision, backend: Backend, *, max_tokens: int, report: Report
) -> Any:
    """The model in `folder`, frozen in `precision`, with adapters that train.

    Raises MissingError when unsloth is asked for and can not be imported, ModelError when the model has none
    of LORA_MODULES.
    """
    if fast := _unsloth(backend, report):
        return _with_unsloth(fast, folder, lora, precision, max_tokens)
    from peft import LoraConfig, get_peft_model

    model = load(folder, precision=precision)
    import torch

    if lora.rank > (hidden := model.config.get_text_config().hidden_size):
        raise ModelError(
            f"lora_rank = {lora.rank}, but {folder} has a hidden size of {hidden}: no matrix has a higher rank",
            hint="take 8 to 256, or train all weights",
        )
    torch.manual_seed(lora.seed)  # A is drawn at random, B starts at zero
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=LORA_MODULES,
        layers_to_transform=lora.layers(model),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"{folder}: LoRA can not be put on this model: {error}") from None
    if left := _without_adapters(adapted):
        report.note(f"LoRA does not reach {', '.join(left)}: in this model these matrices stay as they are")
    return adapted


def _without_adapters(model: Any) -> list[str]:
    """Names of the linear modules beside the head that got no adapter in any layer, as MoE and fused ones."""
    adapted, plain = set(), set()
    for name, module in model.named_modules():
        *_, kind = name.removesuffix(".base_layer").split(".")
        if hasattr(module, "lora_A"):
            adapted.add(kind)
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 2 and hasattr(module, "in_features"):
            plain.add(kind)
    inner = {"default", "lm_head"}  # of the adapters themselves, and the head, which is a setting of its own
    return sorted(plain - adapted - inner)


def merged(folder: Path, adapters: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model in `folder`, in its stored precision, with `adapters` added; see `taken_off`."""
    import torch

    model = load(folder, precision="stored")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, (up, down, scale) in adapters.items():
            weight = modules[name].weight
            change = scale * (up.to(weight.device) @ down.to(weight.device))  # [D_out, D_in]
            weight.copy_(weight.float() + change)
    return model


def taken_off(model: Any) -> dict[str, Any]:
    """name of a linear module -> (B, A, scale), in float32, on the CPU.

    Raises ModelError for an adapter that is more than W + scale * B A.
    """
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        if module.lora_variant or getattr(module.lora_B["default"], "bias", None) is not None:
            raise ModelError(f"{name}: the adapter is not plain LoRA")
        up, down = (part["default"].weight.detach().float().cpu() for part in (module.lora_B, module.lora_A))
        found[name.removeprefix("base_model.model.")] = (up, down, float(module.scaling["default"]))
    return found


def save_adapters(adapters: Mapping[str, Any], lora: Lora, layers: list[int] | None, folder: Path) -> None:
    """Write what `taken_off` found as peft's own folder, so that one base can serve several of them.

    folder: adapter_config.json and adapter_model.safetensors, float32. Its base is named by nobody: the file is
    the same wherever it was made.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (up, down, _) in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()  # [r, D_in]
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()  # [D_out, r]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
        "layers_to_transform": layers,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


class Beside:
    """What trains of a model with adapters beside them: whole matrices, the embeddings for one.

    peft's checkpoints leave them out, or (modules_to_save) make a copy of each that unties tied ones.
    """

    FILE = "beside_adapters.safetensors"

    def __init__(self, model: Any) -> None:
        adapted = hasattr(model, "peft_config")
        self.matrices = {
            name: value
            for name, value in (model.named_parameters() if adapted else ())
            if value.requires_grad and ".lora_" not in name
        }

    def save(self, folder: Path) -> None:
        """Write them into `folder`, where there are any."""
        from safetensors.torch import save_file

        if self.matrices:
            save_file({name: value.detach().cpu() for name, value in self.matrices.items()}, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote. Raises ModelError when it is not the same matrices."""
        import torch
        from safetensors.torch import load_file

        saved = load_file(folder / self.FILE) if (folder / self.FILE).is_file() else {}
        if saved.keys() != self.matrices.keys():
            raise ModelError(
                f"{folder}: it holds {sorted(saved) or 'nothing'} beside adapters, "
                f"but what trains is {sorted(self.matrices) or 'nothing'}",
                hint="a checkpoint goes with the settings it was made with; remove the folder to start again",
            )
        with torch.no_grad():
            for name, value in self.matrices.items():
                value.copy_(saved[name])


def _unsloth(backend: Backend, report: Report) -> Any:
    """unsloth's FastLanguageModel where it is asked for, or there is a GPU and it can be had; else None."""
    import torch

    if backend == "peft" or (backend == "auto" and not torch.cuda.is_available()):
        return None
    if backend == "auto" and importlib.util.find_spec("unsloth") is None:
        return None
    late = "transformers" in sys.modules and "unsloth" not in sys.modules
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError, RuntimeError) as error:
        if backend == "unsloth":
            raise MissingError(
                f"backend = 'unsloth': unsloth can not be imported: {error}",
                hint="install it as constraints-unsloth.txt says, or backend = 'peft'",
            ) from None
        report.note(f"unsloth is installed but can not be imported ({error}); going on with peft")
        return None
    if late:
        report.note("transformers was imported before unsloth: some of unsloth's patches do not take effect")
    return FastLanguageModel


def _with_unsloth(fast: Any, folder: Path, lora: Lora, precision: Precision, max_tokens: int) -> Any:
    import torch

    check_files(folder)  # it would read a pickle where there is nothing else
    model, _ = fast.from_pretrained(
        str(folder),
        max_seq_length=max_tokens,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        load_in_4bit=precision == "nf4",
        local_files_only=True,
        trust_remote_code=False,
    )
    return fast.get_peft_model(
        model,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=LORA_MODULES,
        layers_to_transform=lora.layers(model),
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False,  # the training loop sets it
        random_state=lora.seed,
    )
