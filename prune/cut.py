"""Stage prune.cut: a checkpoint without some of its layers, and a config.json that says so.

Weights are streamed: one shard is in memory at most, and no tensor changes its type. What is listed by layer
in config.json is cut with the layers, and what transformers would derive from a layer's position is written
out first, so that each layer keeps its own kind of attention when its neighbours go:

    gemma3_text    sliding_window_pattern (every n-th layer sees everything)   -> layer_types
    qwen2, qwen3   max_window_layers (the first n see everything)              -> layer_types, and fewer of them
    gemma3_text    rotary bases by kind of layer, query_pre_attn_scalar        stay: they belong to no position

A list as long as the model is deep may be one by layer that is not known here: it is refused by name, unless
its name says what else it is (SHARED_LISTS). Not here: which layers should go (importance), and healing.

Source: configuration classes of transformers 5 for the five families.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from foundation.errors import ModelError
from foundation.files import sync_folder, writing
from foundation.model import read_config
from foundation.report import Report, Silent, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, one
from foundation.tensors import HEAD, SHARD_BYTES, TensorFiles, write_config, write_tensors
from foundation.tokenizer import copy_tokenizer
from prune.kept import LISTS_BY_LAYER, Kept, kept_layers, layer_count, write_kept

if TYPE_CHECKING:
    from torch import Tensor

SHARED_LISTS = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")  # lists, but not by layer
STORED = ("F64", "F32", "F16", "BF16")  # safetensors' names of types that are plain weights
COMPUTED = ".rotary_emb.inv_freq"  # a buffer in old checkpoints, computed anew by every reader
QWEN_FULL_LAYERS = 28  # max_window_layers when the key is absent
GEMMA_PERIOD = 6  # sliding_window_pattern when the key is absent
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_SHARING = (
    "layers share keys and values with layers below and read embeddings of their own, so none can go alone"
)
REFUSED = {"gemma3n": _SHARING, "gemma3n_text": _SHARING, "gemma3": "it reads images as well as text"}


class Settings(StageSettings):
    """Settings of prune.cut."""

    layers: tuple[int, ...] = Field(
        min_length=1, description="layers to remove, numbered from 0 as in the model that is read"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read role `model`, write out/model without `layers`. Raises ModelError for what can not be cut."""
    kept = cut_folder(one(inputs, "model"), settings.layers, out / "model", report=report)
    return {
        "layers": len(kept.kept),
        "original_layers": kept.original_layers,
        "removed": ", ".join(map(str, kept.removed)),
        "parameters": ModelShape.from_folder(out / "model").parameters(),
    }


def cut_folder(
    folder: Path,
    layers: Sequence[int],
    out: Path,
    *,
    report: Report | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Kept:
    """Write `folder` without `layers` (its own numbers, from 0) as the folder `out`; the map of what stays.

    config.json is written last: a folder that was left half done is no model to anyone. The same input gives
    the same bytes. Raises ModelError: a family, a type of weights or a list that is not known here, no such
    layer, one named twice, none left, weights and config.json that disagree, `out` is `folder`.
    """
    report = report or Silent()
    config, files, shape = _checked(folder)
    _check_layers(layers, shape.layers, folder)
    if out.resolve() == folder.resolve():
        raise ModelError(f"{folder} would be overwritten by its own cut", hint="name another folder for it")
    kept = kept_layers(folder).without(layers)
    stay = [i for i in range(shape.layers) if i not in set(layers)]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        sync_folder(out)
        write_tensors(out, _stream(files, stay, report), shard_bytes)
        copy_tokenizer(folder, out)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
        write_kept(out, kept)
        write_config(out, cut_config(config, stay))
    return kept


def cut_config(config: dict[str, Any], stay: Sequence[int]) -> dict[str, Any]:
    """config.json's values for the layers `stay` alone."""
    config = dict(config)
    types = _positional_types(config)
    if types is not None:
        config["layer_types"] = types
    for key in LISTS_BY_LAYER:
        if config.get(key) is not None:
            config[key] = [config[key][i] for i in stay]
    for period in ("sliding_window_pattern", "_sliding_window_pattern"):
        config.pop(period, None)  # no longer true, and layer_types says it all
    full = config.get("max_window_layers")
    if isinstance(full, int):
        config["max_window_layers"] = sum(i < full for i in stay)
    return config | {"num_hidden_layers": len(stay)}


def _positional_types(config: dict[str, Any]) -> list[str] | None:
    """layer_types that transformers would derive from positions; None where it is given or not needed."""
    kind, layers = config["model_type"], range(config["num_hidden_layers"])
    if config.get("layer_types") is not None:
        return None
    if kind == "gemma3_text":
        period = config.get("sliding_window_pattern") or GEMMA_PERIOD
        return ["sliding_attention" if (i + 1) % period else "full_attention" for i in layers]
    if kind in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        full = config.get("max_window_layers", QWEN_FULL_LAYERS)
        return ["full_attention" if i < full else "sliding_attention" for i in layers]
    return None


def _checked(folder: Path) -> tuple[dict[str, Any], TensorFiles, ModelShape]:
    """Config, weights and sizes of a model that layers can be cut from. Raises ModelError."""
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if kind in REFUSED:
        raise ModelError(
            f"{folder}: no layers can be cut from {kind}: {REFUSED[kind]}",
            hint="take the text model, of model_type gemma3_text"
            if kind == "gemma3"
            else "prune another model",
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{folder}: a quantised checkpoint can not be cut",
            hint="cut the model in float32, float16 or bfloat16, and quantise what is left",
        )
    layers = layer_count(config, folder)
    shape = ModelShape.from_config(config)
    unknown = sorted(
        key
        for key, value in config.items()
        if isinstance(value, list) and len(value) == layers and key not in (*LISTS_BY_LAYER, *SHARED_LISTS)
    )
    if unknown:
        raise ModelError(
            f"{folder}: config.json lists {', '.join(unknown)} with {layers} entries, as many as there are "
            "layers; whether they belong to layers is not known",
            hint="remove the key from config.json if the model does not need it",
        )
    files = TensorFiles(folder)
    _check_tensors(files, shape)
    return config, files, shape


def _check_tensors(files: TensorFiles, shape: ModelShape) -> None:
    """Raise ModelError unless the weights are those of config.json, each known by name, in a plain type."""
    wanted = shape.tensors()
    known = wanted | {HEAD: (shape.vocab, shape.hidden)}  # some files keep a copy of a tied head
    problems = [f"missing {name}" for name in wanted if name not in files]
    for name in files:
        if name.endswith(COMPUTED):
            continue
        if name not in known:
            problems.append(f"unknown {name}")
        elif files.shape(name) != known[name]:
            problems.append(f"{name} is {files.shape(name)}, config.json says {known[name]}")
        elif files.dtype(name) not in STORED:
            problems.append(f"{name} is {files.dtype(name)}, cut are {', '.join(STORED)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"{files.folder}: weights that can not be cut: {'; '.join(problems[:5])}{more}",
            hint="take weights and config.json of one plain model, adapters merged",
        )


def _check_layers(layers: Sequence[int], total: int, folder: Path) -> None:
    """Raise ModelError unless `layers` are different layers of `total`, and one stays."""
    absent = sorted({i for i in layers if not 0 <= i < total})
    twice = sorted({i for i in layers if list(layers).count(i) > 1})
    if absent:
        raise ModelError(f"{folder} has no layer {', '.join(map(str, absent))}; it has 0..{total - 1}")
    if twice:
        raise ModelError(f"layers named twice: {', '.join(map(str, twice))}", hint="name each layer once")
    if len(layers) >= total:
        raise ModelError(f"{folder} has {total} layers, and all would go", hint="one layer at least must stay")


def _stream(files: TensorFiles, stay: Sequence[int], report: Report) -> Iterator[tuple[str, Tensor]]:
    """(new name, tensor) of all that stays, each read when it is its turn."""
    place = {old: new for new, old in enumerate(stay)}
    for done, name in enumerate(files, 1):
        match = _LAYER.match(name)
        if name.endswith(COMPUTED) or (match and int(match[1]) not in place):
            continue
        new = f"model.layers.{place[int(match[1])]}.{name[match.end() :]}" if match else name
        yield new, files.read(name)
        report.progress(done, len(files), "tensor")
        stop_if_asked(report)
