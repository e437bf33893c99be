"""Models as Hugging Face folders: load, make, save. The only place that calls from_pretrained.

Weights come from safetensors alone: a pickle from outside is a program. Remote code is never run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation.artifact import hint_for
from foundation.errors import MissingError, ModelError
from foundation.tokenizer import Tokenizer, copy_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["fp32", "bf16", "nf4", "stored"]

NF4_BLOCK = 64  # numbers that share a scale


def load(folder: Path, *, precision: Precision = "fp32") -> PreTrainedModel:
    """The causal language model in `folder`, in evaluation mode, on the accelerator if there is one.

    nf4 is for reading and for QLoRA (Dettmers et al. 2023): 4 bits a weight in the linear layers, whose scales
    are quantised too; embedding, head and norms in bf16, which is also what it computes in. Weights come from
    the disk in the precision asked for: no second copy is held. "stored" is whatever the files hold.

    Raises ModelError when there are no safetensors, transformers can not build the model, a weight is missing
    or left over (transformers would fill the gap with random numbers and only warn), or the tokenizer beside
    it has more tokens than the embedding has rows; MissingError for nf4 without bitsandbytes.
    """
    import torch

    transformers = quiet_transformers()
    check_files(folder)
    quantized = four_bits(transformers) if precision == "nf4" else None
    dtype = {"fp32": torch.float32, "stored": "auto"}.get(precision, torch.bfloat16)
    model = _read(transformers.AutoModelForCausalLM, folder, dtype, quantized)
    if quantized:
        _check_widths(folder, model)
    _check_vocabulary(folder, model.config.vocab_size)
    return model.eval()


def load_classifier(folder: Path, precision: Literal["fp32", "bf16"]) -> Any:
    """A sequence classifier in evaluation mode; raises ModelError as `load` does."""
    import torch

    transformers = quiet_transformers()
    check_files(folder)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = _read(transformers.AutoModelForSequenceClassification, folder, dtype)
    _check_vocabulary(folder, model.get_input_embeddings().num_embeddings)
    return model.eval()


def _read(auto: Any, folder: Path, dtype: Any, quantized: Any = None) -> Any:
    """What transformers' class `auto` makes of `folder`, whose files it must use one and all."""
    try:
        model, report = auto.from_pretrained(
            str(folder),
            dtype=dtype,
            quantization_config=quantized,
            device_map={"": device()},
            attn_implementation=attention(),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names; transformers' own error has none
        )
    except Exception as error:  # a bad folder makes transformers and safetensors raise anything
        raise ModelError(f"{folder}: transformers can not load this model: {error}") from error
    _check_weights(folder, report)
    return model


def four_bits(transformers: Any) -> Any:
    """nf4 with quantised scales, computing in bf16. Raises MissingError without bitsandbytes."""
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            "precision = 'nf4' needs bitsandbytes, which is not installed",
            hint="pip install -c constraints.txt bitsandbytes, or precision = 'bf16'",
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_files(folder: Path) -> None:
    """Raise ModelError unless `folder` holds a config and safetensors."""
    _check_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no *.safetensors",
            hint="pickled weights are not loaded; convert them with safetensors first",
        )


def _check_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        hint = "a model is a folder in Hugging Face's form: config.json, *.safetensors, tokenizer.json"
        raise ModelError(f"{folder}: no config.json", hint=hint_for(folder, "config.json", hint))


def _check_weights(folder: Path, report: dict[str, Any]) -> None:
    """Raise ModelError unless every weight of the model came from the files, and every one there was used."""
    faults = {
        "missing": sorted(map(str, report["missing_keys"])),
        "not of this model": sorted(map(str, report["unexpected_keys"])),
        "of another shape": sorted(str(key[0]) for key in report["mismatched_keys"]),
    }
    said = [f"{len(names)} {what} (first: {names[0]})" for what, names in faults.items() if names]
    if said:
        raise ModelError(
            f"{folder}: config.json and the weights do not belong together: {', '.join(said)}",
            hint="copy both from the same model; a changed num_hidden_layers or hidden_size shows like this",
        )


def _check_widths(folder: Path, model: Any) -> None:
    """Raise ModelError for a 4-bit layer that bitsandbytes' CPU code reads back wrongly.

    Measured with 0.50.2: a row that is no whole number of 64-blocks comes back with three times nf4's error.
    """
    if device() != "cpu":
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % NF4_BLOCK:
            raise ModelError(
                f"{folder}: {name} is {module.in_features} wide; nf4 on a CPU takes multiples of {NF4_BLOCK}",
                hint="set precision or base_precision, whichever says nf4, to bf16",
            )


def _check_vocabulary(folder: Path, rows: int) -> None:
    """Raise ModelError when the tokenizer beside the model knows ids that the embedding has no row for."""
    if (folder / "tokenizer.json").is_file() and len(tokenizer := Tokenizer(folder)) > rows:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows",
            hint="an extended tokenizer goes with a model made by adaptation.embeddings",
        )


def context_tokens(folder: Path) -> int:
    """Longest sequence that the model in `folder` was made for."""
    return int(read_config(folder).get("max_position_embeddings", 2**31))


def create(config: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model with random weights; `config` as in config.json, with its model_type. Raises ModelError."""
    import torch

    transformers = quiet_transformers()
    torch.manual_seed(seed)
    kind = config["model_type"]
    try:
        made = transformers.AutoConfig.for_model(**config)
        return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention()).to(device())
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"a {kind} model can not be made of this shape: {error}") from None


def save(model: PreTrainedModel, tokenizer_folder: Path, out: Path) -> None:
    """Write `model`, in the precision that it is in, as safetensors beside the files of its tokenizer.

    The same model gives the same bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(out), safe_serialization=True)
    copy_tokenizer(tokenizer_folder, out)


def device() -> str:
    """Where models live: this process's GPU when torch finds one, else "cpu"."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def attention() -> str:
    """torch's fused attention on a GPU; on a CPU the plain one, whose backward pass is faster there.

    Measured on one core with torch 2.13, a 0.85M Llama, batch 16 x 80, bf16: 74 ms a step against 114.
    """
    return "eager" if device() == "cpu" else "sdpa"


def quiet_transformers() -> Any:
    """transformers, without its progress bars and advice: what matters is told through the Report.

    Raises MissingError when it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingError(
            "transformers is not installed", hint='pip install -c constraints.txt "samovar[train]"'
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every kernel that a CPU has not
    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError when it is missing or not JSON."""
    _check_config(folder)
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "copy it again from its model"
        raise ModelError(f"{folder}: config.json can not be read: {error}", hint=hint) from None
