"""A peft LoRA folder, read without peft: which matrices of the base it changes, and by how much.

    W' = W + scale * B A        A [r, D_in], B [D_out, r]; scale = alpha / r, or alpha / sqrt(r) (rsLoRA)

adapter_config.json names the targets, the ranks and the scales, adapter_model.safetensors holds A and B. The
two must agree with each other and with the base: peft only warns of tensors that it can not place, and goes on
without them. What is more than the sum above (DoRA, trained biases, replicated layers, a base that the
adapter's own start has changed) is refused by name, and so is every key that is not known here.

Source: peft 0.21, LoraConfig and get_peft_model_state_dict; rsLoRA: Kalajdzievski 2023.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.weights.checkpoint import Checkpoint, floats
from foundation.errors import ModelError
from foundation.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

READ_HERE = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
}  # fmt: skip
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out",
    "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    "modules_to_save",
}  # fmt: skip
# fan_in_fan_out is of Conv1D, which no family here has; modules_to_save: their tensors must be the base's.
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is

_PART = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)"
)
_WHOLE = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer|\.modules_to_save)?\.(weight|bias)")
# Keys of rank_pattern and alpha_pattern are run as they stand, so only these are: each .* or \d+ of one costs
# a factor of a name's length.
_PATTERN, _WILD = re.compile(r"\^?(?:\\\.|\\d\+|\.\*|[\w.|])+"), 2
ALPHAS = (1e-9, 1e9)  # what a float32 surely holds: llama.cpp takes an alpha of 0 for a scale of 1


@dataclass(frozen=True)
class Pair:
    """A and B of one matrix, by their names in the file."""

    down: str  # A [r, D_in]; of the embedding [r, V]
    up: str  # B [D_out, r]; of the embedding [D, r]
    rank: int
    scale: float


@dataclass(frozen=True)
class Lora:
    """An adapter that fits its base. `pairs`: the base's name of a weight -> its pair, in the base's order."""

    checkpoint: Checkpoint
    pairs: dict[str, Pair]
    alpha: float  # such that alpha / r is the scale, but for `alpha_pattern`
    base: str  # what the config calls its base: a name on the hub, or a path

    def read(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) of a weight in float32. Raises ModelError when a number is none.  # [r, D_in], [D_out, r]"""
        import numpy as np

        pair = self.pairs[weight]
        found = []
        for name in (pair.down, pair.up):
            values = self.checkpoint.read(name)
            if not np.isfinite(values).all():
                raise ModelError(f"{name} holds infinite or undefined numbers", hint="its training diverged")
            found.append(values)
        return found[0], found[1]

    def parameters(self) -> int:
        """Number of weights in all pairs."""
        return sum(
            prod(self.checkpoint.shape(name)) for pair in self.pairs.values() for name in (pair.down, pair.up)
        )

    def factor(self, weight: str) -> float:
        """By what B is multiplied, for the one alpha of a GGUF file to give this pair's own scale."""
        pair = self.pairs[weight]
        factor = pair.scale * pair.rank / self.alpha
        return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def read_lora(folder: Path, shape: ModelShape, base: Checkpoint) -> Lora:
    """The adapter in `folder`, made for a base of `shape` whose weights are `base`.

    Raises ModelError with everything that is wrong: files missing or damaged, more than plain LoRA, half a
    pair, another rank than the config's, matrices that the base has not or has in another shape, weights that
    are saved whole and are not the base's.
    """
    config = _config(folder)
    problems = _more_than_lora(config)
    if problems:
        raise ModelError(
            f"{folder / CONFIG}: " + "; ".join(problems),
            hint="merge the adapter into its model (peft's merge_and_unload) and export that",
        )
    checkpoint = Checkpoint(folder, WEIGHTS)
    halves, whole = _sorted(checkpoint, problems)
    sizes = _matrices(shape)
    alpha = float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(config["r"])
    pairs = {}
    for weight in [*(name for name in sizes if name in halves), *sorted(halves.keys() - sizes.keys())]:
        if weight not in sizes:
            problems.append(_unknown(weight, shape))
        elif (pair := _pair(weight, sizes[weight], halves[weight], checkpoint, config, problems)) is not None:
            pairs[weight] = pair
    problems += _against_targets(config, _modules(shape), set(halves))
    problems += _changed(whole, checkpoint, base, shape)
    if not halves and not problems:
        problems.append("no lora_A and lora_B in it")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"{folder} does not fit its base {base.folder}: {'; '.join(problems[:5])}{more}",
            hint="give the model that the adapter was trained on",
        )
    return Lora(checkpoint, pairs, alpha, str(config.get("base_model_name_or_path") or ""))


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, as far as it is a table. Raises ModelError."""
    path = folder / CONFIG
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = "give a folder saved by peft's save_pretrained; pickled adapters (*.bin) are not read"
            raise ModelError(f"{folder} holds no {name}", hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint="copy it again from its model") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no table but {type(config).__name__}")
    return config


def _more_than_lora(config: dict[str, Any]) -> list[str]:
    """What the config asks for beside W + scale * B A, and values that can not be."""
    out = [
        f"{key} = {value!r} is more than plain LoRA"
        for key, value in config.items()
        if value and key not in READ_HERE | WITHOUT_EFFECT
    ]
    if config.get("peft_type") != "LORA":
        out.append(f"peft_type is {config.get('peft_type')!r}; LORA can be exported")
    if config.get("bias", "none") != "none":
        out.append(f"bias = {config['bias']!r}: trained biases have no place in a GGUF adapter")
    if (start := config.get("init_lora_weights", True)) not in STARTS:
        out.append(f"init_lora_weights = {start!r} changes the base that the adapter is added to")
    if type(config.get("r")) is not int or config["r"] < 1:
        out.append(f"r is {config.get('r')!r}, 1 or more is needed")
    if not _allowed(config.get("lora_alpha")):
        out.append(f"lora_alpha is {config.get('lora_alpha')!r}, {ALPHAS[0]:g}..{ALPHAS[1]:g} is allowed")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            out.append(f"{key} is {patterns!r}, a table is needed")
            continue
        for pattern, value in patterns.items():
            if not _PATTERN.fullmatch(pattern) or len(re.findall(r"\.\*|\\d\+", pattern)) > _WILD:
                out.append(
                    rf"{key}: {pattern!r}; names with \., .*, \d+ and | are read, and no other expressions"
                )
            if not _allowed(value):
                out.append(f"{key}: {pattern} = {value!r}, {ALPHAS[0]:g}..{ALPHAS[1]:g} is allowed")
    layers = config.get("layers_to_transform")
    if not all(type(layer) is int for layer in (layers if isinstance(layers, list) else [layers or 0])):
        out.append(f"layers_to_transform is {layers!r}, numbers of layers are needed")
    if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        out.append(f"layers_pattern is {config['layers_pattern']!r}; the layers of these models are 'layers'")
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key)
        if not (names is None or isinstance(names, str)) and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            out.append(f"{key} is {names!r}, names are needed")
    return out


def _allowed(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and ALPHAS[0] <= value <= ALPHAS[1]


def _sorted(checkpoint: Checkpoint, problems: list[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(weight -> {"A": name in the file, "B": ...}, weight or bias of the base -> name in the file)."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in checkpoint.names():
        part = _PART.fullmatch(name)
        if part and (part[1] == EMBEDDING) == part[2].startswith("lora_embedding"):
            halves.setdefault(f"{part[1]}.weight", {})["A" if "_A" in part[2] else "B"] = name
        elif saved := _WHOLE.fullmatch(name):
            whole[f"{saved[1]}.{saved[2]}"] = name
        else:
            problems.append(f"unknown tensor {name}")
    return halves, whole


def _matrices(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what may have an adapter: projections; embedding and head, if they are two."""
    return {
        name: size
        for name, size in shape.tensors().items()
        if len(size) == 2 and not (shape.tied and name == f"{EMBEDDING}.weight")
    }


def _modules(shape: ModelShape) -> list[str]:
    """Names of all modules that peft could have put an adapter on."""
    names = [name.removesuffix(".weight") for name, size in shape.tensors().items() if len(size) == 2]
    return names if HEAD in names else [*names, HEAD]


def _unknown(weight: str, shape: ModelShape) -> str:
    """Why the adapter may not change this weight."""
    if shape.tied and weight in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
        module = weight.removesuffix(".weight")
        return f"it changes {module}, and embedding and head of this base are one matrix for llama.cpp"
    return f"the base has no {weight} ({shape.layers} layers of {shape.model_type})"


def _pair(
    weight: str,
    size: tuple[int, ...],
    halves: dict[str, str],
    checkpoint: Checkpoint,
    config: dict[str, Any],
    problems: list[str],
) -> Pair | None:
    """The pair of a weight [D_out, D_in], or None with the reason among `problems`."""
    if len(halves) < 2:
        problems.append(
            f"{next(iter(halves.values()))} stands alone, without its lora_{'B' if 'A' in halves else 'A'}"
        )
        return None
    module = weight.removesuffix(".weight")
    rows, columns = size
    if module == EMBEDDING:  # a row is looked up, not multiplied: A has a column for each token
        rows, columns = columns, rows
    rank = int(_of_pattern(config, "rank_pattern", module, config["r"]))
    for name, wanted in ((halves["A"], (rank, columns)), (halves["B"], (rows, rank))):
        if (seen := checkpoint.shape(name)) != wanted:
            problems.append(f"{name} is {seen}, rank {rank} on this base makes it {wanted}")
            return None
    alpha = _of_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Pair(halves["A"], halves["B"], rank, scale)


def _of_pattern(config: dict[str, Any], key: str, module: str, default: float) -> float:
    """The value of the first pattern that the module's name ends in, as peft looks it up."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def _against_targets(config: dict[str, Any], modules: list[str], weights: set[str]) -> Iterator[str]:
    """Where the file and the config's lists of modules disagree; an expression is left to peft."""
    targets, left_out = config.get("target_modules"), config.get("exclude_modules") or []
    if not isinstance(targets, list) or isinstance(left_out, str):
        return
    layers = config.get("layers_to_transform")
    chosen = None if layers in (None, []) else {layers} if isinstance(layers, int) else set(layers)

    def named(module: str, names: list[str]) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    def targeted(module: str) -> bool:
        layer = re.search(r"\.layers\.(\d+)\.", module)
        reached = chosen is None or module in targets or (layer is not None and int(layer[1]) in chosen)
        return named(module, targets) and not named(module, left_out) and reached

    for target in sorted(targets):
        if not any(named(module, [target]) for module in modules):
            yield f"target_modules names {target}, which the base has not"
    for module in modules:
        if targeted(module) and f"{module}.weight" not in weights:
            yield f"missing lora_A and lora_B of {module}, a target by {CONFIG}"
        elif not targeted(module) and f"{module}.weight" in weights:
            yield f"lora_A and lora_B of {module}, which is no target by {CONFIG}"


def _changed(
    whole: dict[str, str], checkpoint: Checkpoint, base: Checkpoint, shape: ModelShape
) -> Iterator[str]:
    """Weights saved whole (modules_to_save, embeddings) that are not those of the base."""
    sizes = shape.tensors()
    for weight, name in whole.items():
        twin = f"{EMBEDDING}.weight" if shape.tied and weight == f"{HEAD}.weight" else weight
        if twin not in sizes:
            yield f"unknown tensor {name}"
        elif checkpoint.shape(name) != sizes[twin]:
            yield f"{name} is {checkpoint.shape(name)}, the base has {sizes[twin]}"
        elif _digest(checkpoint, name) != _digest(base, twin):
            yield f"{name} is saved whole and is not the base's: a GGUF adapter has no place for it"


def _digest(checkpoint: Checkpoint, name: str) -> str:
    """sha256 of a tensor's values in float32, whatever the file keeps; read in blocks."""
    digest = hashlib.sha256()
    for block in checkpoint.blocks(name):
        digest.update(floats(block).tobytes())
    return digest.hexdigest()
