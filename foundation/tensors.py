"""Weights of a model folder as a table of tensors, read one at a time and written as a stream.

What changes a model's matrices without running it (new embedding rows, cut layers) needs no model class and
should need no memory for the whole model: `TensorFiles` reads single tensors out of safetensors, one file or
shards; `write_tensors` writes a stream of them, holding one shard at a time.

Not here: loading a model to run it (model.py), and formats with pickles in them, which are programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foundation.errors import ModelError
from foundation.files import write_json, writing

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
EMBEDDING = "embed_tokens.weight"  # end of the name of the input embeddings [V, D]
HEAD = "lm_head.weight"  # name of the LM head [V, D]; mostly not stored where it is tied to the embeddings


class TensorInfo(NamedTuple):
    """What the header says of one tensor. `dtype` is safetensors' name: F32, BF16, ..."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a folder's safetensors files: names in sorted order, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError when there are no safetensors, or they are damaged or incomplete."""
        self.folder = folder
        self.table: dict[str, TensorInfo] = {}
        for path in _files(folder):
            self.table.update(_header(path))
        self.table = dict(sorted(self.table.items()))
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.table[name].shape

    def dtype(self, name: str) -> str:
        return self.table[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype it is stored in."""
        from safetensors import safe_open

        path = self.table[name].file
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        return self._open[path].get_tensor(name)

    def embedding(self) -> str:
        """Name of the input embeddings [V, D]. Raises ModelError when there is not exactly one."""
        found = [name for name in self if name.endswith(EMBEDDING)]
        if len(found) != 1:
            raise ModelError(
                f"{self.folder}: {len(found)} tensors end in {EMBEDDING}, one is needed",
                hint="models of Llama's kind have it: Llama, Mistral, Qwen, Gemma",
            )
        return found[0]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), one in memory at a time."""
        for name in self:
            yield name, self.read(name)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors` as model.safetensors, or as shards of up to `shard_bytes` with their index.

    Weights that stood in `folder` before are removed first, so a write that was killed can be done again. The
    same stream gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
            stale.unlink(missing_ok=True)
        shards: list[list[str]] = []
        total = 0
        for batch in _batches(tensors, shard_bytes):
            total += sum(tensor.nbytes for tensor in batch.values())
            shards.append(sorted(batch))
            _save(batch, folder / f"model-part{len(shards)}.safetensors")
        if len(shards) == 1:
            (folder / "model-part1.safetensors").replace(folder / SINGLE)
            return
        places = {}
        for number, names in enumerate(shards, start=1):
            final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"model-part{number}.safetensors").replace(folder / final)
            places.update(dict.fromkeys(names, final))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_config(folder: Path, config: dict[str, Any], vocab_rows: int | None = None) -> None:
    """config.json; with `vocab_rows`, for embeddings of so many rows."""
    if vocab_rows is not None:
        inner = config.get("text_config")  # models with more than text keep their language model's sizes there
        if isinstance(inner, dict) and "vocab_size" in inner:
            config = config | {"text_config": inner | {"vocab_size": vocab_rows}}
        if "vocab_size" in config or not isinstance(inner, dict):
            config = config | {"vocab_size": vocab_rows}
    write_json(folder / "config.json", config)


def _batches(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Runs of tensors of at most `most_bytes` together; a larger one stands alone. At least one batch."""
    batch: dict[str, Tensor] = {}
    held, yielded = 0, False
    for name, tensor in tensors:
        if batch and held + tensor.nbytes > most_bytes:
            yield batch
            batch, held, yielded = {}, 0, True
        batch[name] = tensor.contiguous()
        held += tensor.nbytes
    if batch or not yielded:
        yield batch


def _save(batch: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(batch, str(path), metadata={"format": "pt"})  # transformers refuses a file that does not say "pt"


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index, or the single one."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of safetensors ({error!r})") from None
        bad = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if bad:
            raise ModelError(
                f"{folder}: missing of the index: {', '.join(bad)}", hint="download the model again"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(
        f"{folder}: no {SINGLE} and no {INDEX}",
        hint="pickled weights are not loaded; convert them with safetensors first",
    )


def _header(path: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return {n: TensorInfo(path, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error})", hint="download or make it again"
        ) from None
