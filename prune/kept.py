"""Which layers of the original a model still has, written beside it as pruning.json.

    {"format": 1, "original": "9f3c...", "original_layers": 28, "kept": [0, 1, 2, 5, ...]}

kept[i] is the original number of layer i. All reports count in original numbers, and healing maps student
layers to teacher layers through it. A folder without the file is an original: it has all its layers.

Not here: the cutting (cut.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import ModelError
from foundation.files import write_json
from foundation.model import read_config
from foundation.tensors import TensorFiles

PRUNING = "pruning.json"
FORMAT = 1
LISTS_BY_LAYER = ("layer_types",)  # keys of config.json that hold one entry a layer, in the families known here


@dataclass(frozen=True)
class Kept:
    """`kept[i]`: original number of layer i, of `original_layers`; `original`: identity of the uncut model."""

    original_layers: int
    kept: tuple[int, ...]
    original: str

    def without(self, layers: Iterable[int]) -> Kept:
        """The same less `layers`, which are numbers of the model as it is, not of the original."""
        gone = set(layers)
        return Kept(
            self.original_layers, tuple(k for i, k in enumerate(self.kept) if i not in gone), self.original
        )

    @property
    def removed(self) -> tuple[int, ...]:
        """Original numbers of the layers that are gone."""
        return tuple(i for i in range(self.original_layers) if i not in self.kept)


def kept_layers(folder: Path) -> Kept:
    """What `folder`/pruning.json says, held against its config.json; all layers where there is no such file.

    Raises ModelError: no config.json, a list by layer of another length than num_hidden_layers, or a map that
    is damaged or belongs to another number of layers.
    """
    layers = layer_count(read_config(folder), folder)
    path = folder / PRUNING
    if not path.exists():
        return Kept(layers, tuple(range(layers)), identity(folder))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = Kept(value["original_layers"], tuple(value["kept"]), value["original"])
        form = value["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(path, f"it can not be read ({error!r})") from None
    if form != FORMAT:
        raise _refused(path, f"format is {form!r}, {FORMAT} is known")
    if not isinstance(found.original, str) or not all(_whole(n) for n in (found.original_layers, *found.kept)):
        raise _refused(path, "original is no text, or a layer is no whole number")
    if any(b <= a for a, b in zip(found.kept, found.kept[1:], strict=False)):
        raise _refused(path, f"kept layers must rise, seen {list(found.kept)}")
    if found.kept and not 0 <= found.kept[0] <= found.kept[-1] < found.original_layers:
        raise _refused(path, f"kept layers {list(found.kept)} are not all in 0..{found.original_layers - 1}")
    if len(found.kept) != layers:
        raise _refused(path, f"it names {len(found.kept)} layers, config.json has num_hidden_layers {layers}")
    return found


def write_kept(folder: Path, kept: Kept) -> None:
    """Write `folder`/pruning.json: needed wherever a cut model is saved anew, after healing for one."""
    write_json(
        folder / PRUNING,
        {
            "format": FORMAT,
            "original": kept.original,
            "original_layers": kept.original_layers,
            "kept": list(kept.kept),
        },
    )


def identity(folder: Path) -> str:
    """sha256 of config.json's values and of every tensor's name, type and shape.

    It tells models of other shapes or settings apart without reading weights; two trainings of one shape
    share it. Raises ModelError when the folder holds no model.
    """
    files = TensorFiles(folder)
    table = [[name, files.dtype(name), list(files.shape(name))] for name in files]
    text = json.dumps([read_config(folder), table], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def layer_count(config: dict[str, Any], folder: Path) -> int:
    """num_hidden_layers. Raises ModelError when it is no number, or a list by layer has another length."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or not _whole(layers) or layers < 1:
        raise ModelError(f"{folder}: num_hidden_layers is {layers!r}, a whole number above 0 is needed")
    for key in LISTS_BY_LAYER:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != layers:
            seen = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise ModelError(
                f"{folder}: {key} has {seen}, num_hidden_layers is {layers}",
                hint="take config.json from the same model as the weights; an earlier cut may have missed it",
            )
    return layers


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path}: {why}",
        hint="cut the original again with prune.cut, or delete the file if this is an original",
    )
