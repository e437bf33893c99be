"""The header of a GGUF file: its keys and the names of its tensors, and whether llama.cpp can take them.

llama.cpp ends the process on some numbers that no sound file holds. They are looked at here before it sees
the file. Long lists of texts (the vocabulary) are passed over, so this takes milliseconds where gguf's own
reader takes seconds. Source: docs/gguf.md of ggml, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import ModelError

MAX_BLOCKS = 512  # llama.cpp's LLAMA_MAX_LAYERS
MAX_CONTEXT = 2**24  # tokens; of a vocabulary too
MAX_WIDTH, MAX_INNER, MAX_HEADS = 2**20, 2**24, 2**16
MAX_DIMENSIONS = 4  # ggml's
MAX_LIST = 4096  # numbers of a list that are kept: those with one number a layer
MAX_TEXTS = 256  # texts of a list that are kept: languages and tags, not vocabularies
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp names the parts of a split model
_BLOCK = re.compile(r"blk\.(\d+)\.")
_OTHERS = {
    "adapter": "is an adapter; open its base and give this beside it",
    "imatrix": "is no model but an importance matrix",
}
_FLOAT = 6
_ADAPTER_TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}  # what adapters are written in
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def find(path: Path) -> Path:
    """The GGUF file to open at `path`: itself, the only one of a folder, or the first of its shards.

    Raises ModelError: none, or several that are not shards of one model.
    """
    if path.is_file():
        return path
    found = files(path)
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:5]) or "no GGUF file"
    raise ModelError(f"{path} holds {names}; one is needed", hint="name the file itself")


def files(folder: Path) -> list[Path]:
    """The GGUF files of a folder by name; of a model in shards the first."""
    found = sorted(file for file in folder.glob("*.gguf") if file.is_file())  # a link may lead nowhere
    return [file for file in found if not (part := SHARD.search(file.name)) or int(part[1]) == 1]


def shards(path: Path) -> list[Path]:
    """All files of the model that begins with `path`: itself, or every shard. ModelError where one lacks."""
    part = SHARD.search(path.name)
    if part is None:
        return [path]
    stem, count = path.name[: part.start()], int(part[2])
    found = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [file.name for file in found if not file.is_file()]:
        raise ModelError(f"{path}: of its {count} shards {', '.join(missing[:3])} is missing")
    return found


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(keys with their values, names of the tensors). Raises ModelError when the header is not whole."""
    found = header(path)
    return found.keys, [tensor.name for tensor in found.tensors]


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header tells of it. `sizes`: as GGUF keeps them, the length of a row first."""

    name: str
    sizes: tuple[int, ...]
    type: int


@dataclass(frozen=True)
class Header:
    """`keys_bytes`: where the keys end and the table of tensors begins."""

    keys: dict[str, Any]
    kinds: dict[str, int]  # number of each key's type
    tensors: list[Tensor]
    keys_bytes: int


def header(path: Path) -> Header:
    """All that `read` gives, with types and sizes. Raises ModelError when it is not whole."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(data).header()
        except (struct.error, ValueError, KeyError) as error:
            raise ModelError(f"{path} is refused: its header can not be read ({error!r})") from None


def check(path: Path) -> None:
    """Raise ModelError when the header holds numbers on which llama.cpp would end the process, or no model."""
    keys, names = read(path)
    kind = keys.get("general.type")
    if isinstance(kind, str) and kind in _OTHERS:
        raise ModelError(f"{path} {_OTHERS[kind]}", hint="a model's file is needed here")
    arch = keys.get("general.architecture")
    faults = _faults({key.removeprefix(f"{arch}."): value for key, value in keys.items()}, names)
    if faults:
        raise ModelError(
            f"{path} is refused: {'; '.join(faults)}", hint="the file is damaged or hostile; export it again"
        )


def check_adapter(path: Path, base: Path) -> None:
    """Raise ModelError when llama.cpp would end the process on this adapter beside the model `base`.

    What it refuses by itself (another architecture, a tensor or a shape that the base has not) is left to it.
    """
    found = header(path)
    keys = found.keys
    if keys.get("general.type") != "adapter":
        raise ModelError(f"{path} is no adapter: its general.type is {keys.get('general.type')!r}")
    faults = [
        f"{key} is {keys.get(key)!r}, a text is needed"
        for key in ("general.architecture", "adapter.type")
        if not isinstance(keys.get(key), str)
    ]
    alpha = keys.get(key := "adapter.lora.alpha", 1.0)
    if found.kinds.get(key, _FLOAT) != _FLOAT or not math.isfinite(alpha):
        faults.append(f"{key} is {alpha!r}, a finite 32-bit float is needed")
    faults += _pair_faults({t.name: t for t in found.tensors})
    embedding = any(t.name.startswith(f"{_EMBEDDING}.") for t in found.tensors)
    if embedding and _OUTPUT not in _names_of_all_shards(base):
        faults.append(f"it changes the embedding, which is the output matrix too in {base.name}")
    if faults:
        raise ModelError(
            f"{path} is refused: {'; '.join(faults[:5])}", hint="the adapter is damaged; export it again"
        )


def _pair_faults(tensors: dict[str, Tensor]) -> list[str]:
    """What is wrong with the tensors X.lora_a and X.lora_b alone and as pairs."""
    out = []
    for name, tensor in tensors.items():
        if not name.endswith((".lora_a", ".lora_b")):
            continue
        if len(tensor.sizes) != 2 or min(tensor.sizes) < 1 or tensor.type not in _ADAPTER_TYPES:
            known = ", ".join(_ADAPTER_TYPES.values())
            out.append(f"{name} is {tensor.sizes} of type {tensor.type}; a matrix of {known} is needed")
    if not tensors:
        out.append("it holds no tensors")
    down, up = (tensors.get(f"{_EMBEDDING}.{part}") for part in ("lora_a", "lora_b"))
    if down and up and down.sizes[0] != up.sizes[0]:  # both are kept with rows of the rank
        out.append(f"the pair of {_EMBEDDING} has ranks {down.sizes[0]} and {up.sizes[0]}")
    return out


def _names_of_all_shards(path: Path) -> set[str]:
    """Names of a model's tensors, those of its other shards too."""
    return {name for shard in shards(path) for name in read(shard)[1]}


def _faults(keys: dict[str, Any], names: list[str]) -> list[str]:
    """What is wrong with the numbers; a key that is missing is llama.cpp's to miss."""
    out = []
    for key, top in (
        ("block_count", MAX_BLOCKS),
        ("context_length", MAX_CONTEXT),
        ("embedding_length", MAX_WIDTH),
        ("feed_forward_length", MAX_INNER),
        ("attention.head_count", MAX_HEADS),
        ("attention.head_count_kv", MAX_HEADS),
    ):
        for value in _each(keys.get(key, [])):
            if type(value) is not int or not 1 <= value <= top:
                out.append(f"{key} is {value}, 1..{top} is allowed")
                break
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        value = keys.get(key, 1e-6)
        if type(value) is not float or not (math.isfinite(value) and value > 0):
            out.append(f"{key} is {value}, a finite number above 0 is needed")
    return out or _mismatches(keys, names)


def _mismatches(keys: dict[str, Any], names: list[str]) -> list[str]:
    """Numbers that are possible alone and do not fit each other."""
    out = []
    blocks, width = keys.get("block_count"), keys.get("embedding_length")
    heads, shared = keys.get("attention.head_count"), keys.get("attention.head_count_kv")
    found = {int(match[1]) for match in map(_BLOCK.match, names) if match}
    if names and keys.get("split.count", 1) <= 1 and blocks is not None and found != set(range(blocks)):
        out.append(f"block_count is {blocks}, the tensors are those of {len(found)} blocks")
    if type(heads) is int and type(shared) is int and heads % shared:
        out.append(f"{heads} heads can not share {shared} keys")
    if type(heads) is int and width and "attention.key_length" not in keys and width % heads:
        out.append(f"embedding_length {width} is no multiple of {heads} heads")
    return out


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class _Reader:
    """A place in the bytes of a header, moving forward."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> Header:
        magic, version = self._number("I"), self._number("I")
        if magic != int.from_bytes(b"GGUF", "little") or version not in (2, 3):
            raise ValueError(f"GGUF version {version}; 2 and 3 are known")
        tensors, count = self._number("Q"), self._number("Q")
        keys: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        for _ in range(count):
            key = self._text()
            if key in keys:
                raise ValueError(f"two keys {key[:80]}")
            kinds[key] = self._number("I")
            keys[key] = self._value(kinds[key])
        keys_bytes = self._at
        table = []
        for _ in range(tensors):
            name, dimensions = self._text(), self._number("I")
            if dimensions > MAX_DIMENSIONS:
                raise ValueError(f"tensor {name[:80]} has {dimensions} dimensions")
            sizes = tuple(self._number("Q") for _ in range(dimensions))
            table.append(Tensor(name, sizes, self._number("I")))
            self._skip(8)  # its place
        return Header(keys, kinds, table, keys_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        return self._list() if kind == _LIST else self._number(_NUMBERS[kind])

    def _list(self) -> list[Any] | None:
        """A list; None for one that is too long to be about layers or languages."""
        kind, count = self._number("I"), self._number("Q")
        if kind == _TEXT and count <= MAX_TEXTS:
            return [self._text() for _ in range(count)]
        if kind == _TEXT:
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        form = _NUMBERS[kind]
        if count <= MAX_LIST:
            return [self._number(form) for _ in range(count)]
        self._skip(count * struct.calcsize("<" + form))
        return None

    def _number(self, form: str) -> Any:
        start = self._at
        self._at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, self._data, start)[0]

    def _text(self) -> str:
        size, start = self._number("Q"), self._at
        self._skip(size)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("it goes on past the end of the file")
