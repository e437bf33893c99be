"""How many bytes a model's GGUF file will have, before anything is written: exact, from config and tokenizer.

    file = header + keys + tensor table, padded to 32 bytes + every tensor, each padded to 32 bytes

So the pruning loop can ask how many layers fit a file size. No weights are read, and the model's layers may be
fewer than it has (`layers`): what a file weighs depends on how many are left, not on which.

llama.cpp's mixes are rules about names, shapes and places in the model. Q4_K_M means Q4_K, and Q6_K where an
error costs most: the output matrix, and attention values and the inner feed-forward matrix of the first and
last eighth of the layers and of every third between. Rows that are no multiple of a type's block get a larger
type, in the end F16.

Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type, tensor_type_fallback), for the mixes and
families of this project only; tests compare sizes with files that llama.cpp wrote.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from export.architectures import TARGETS, check, describe, gguf_names, rope_divisors
from export.gguf import FILE_TYPES
from export.quantize import MIXES
from export.vocabulary import read_vocabulary, write_vocabulary
from foundation.errors import ModelError
from foundation.files import stamps
from foundation.shape import ModelShape

ALIGNMENT_BYTES = 32
HEADER_BYTES = 4 + 4 + 8 + 8  # magic, version, number of tensors, number of keys
BLOCKS = {  # type -> (weights, bytes) of a block
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for rows that are no multiple of 256
NUMBER_BYTES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # by GGUF's number of the value type; 8 text, 9 list
TEXT, LIST = 8, 9
KINDS = (*(name.upper() for name in FILE_TYPES), *MIXES)


def gguf_bytes(folder: Path, kind: str, layers: int | None = None, *, model_name: str = "model") -> int:
    """Bytes of the file that export.gguf and export.quantize make of the model in `folder` as `kind`.

    kind: F32, F16, BF16, Q8_0 or Q4_K_M. layers: as if so many of its layers were left; for Gemma 3 one with a
    sliding window among them (without any, the file is some hundred bytes smaller). model_name: general.name.
    Raises ModelError: what can not be exported, an unknown kind, more layers than there are.
    """
    if kind not in KINDS:
        raise ModelError(f"a GGUF file of type {kind!r} is not made here; made are {', '.join(KINDS)}")
    shape = ModelShape.from_folder(folder)
    if layers is not None:
        shape = shape.with_layers(layers)
    target = check(shape)
    types = tensor_types(shape, kind)
    names = gguf_names(shape, target)
    count = HEADER_BYTES + _vocabulary_bytes(folder, shape.vocab, tuple(map(str, stamps(folder).items())))
    count += _key_bytes(_described(shape, model_name))
    tensors = {names[name]: (size, types[name]) for name, size in shape.tensors().items()}
    if divisors := rope_divisors(shape):
        tensors["rope_freqs.weight"] = ((len(divisors),), "F32")
    # a row of the table: name with its length, number of sizes, sizes, type, place in the file
    count += sum(8 + len(name) + 4 + 8 * len(size) + 4 + 8 for name, (size, _) in tensors.items())
    return _padded(count) + sum(_padded(_stored(size, kind)) for size, kind in tensors.values())


def tensor_types(shape: ModelShape, kind: str) -> dict[str, str]:
    """Checkpoint name of every tensor -> ggml's type of it in a file of `kind`."""
    return {
        name: "F32" if len(size) == 1 else _matrix_type(name, size[-1], shape, kind)
        for name, size in shape.tensors().items()
    }


def _matrix_type(name: str, columns: int, shape: ModelShape, kind: str) -> str:
    if kind not in MIXES:
        return kind
    if kind == "Q8_0":
        return _fitting(columns, "Q8_0")
    if name == "lm_head.weight" or (shape.tied and name == "model.embed_tokens.weight"):
        return _fitting(columns, "Q8_0" if columns % BLOCKS["Q4_K"][0] else "Q6_K")
    wanted = "Q4_K"
    if ".v_proj." in name or ".down_proj." in name:
        if _costly(int(name.split(".")[2]), shape.layers):
            wanted = "Q6_K"
        elif ".v_proj." in name and _seventy(shape):
            wanted = "Q5_K"
    return _fitting(columns, wanted)


def _costly(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _seventy(shape: ModelShape) -> bool:
    """What llama.cpp takes for a 70B model, whose few values get more bits."""
    arch = TARGETS[shape.model_type].arch
    return shape.layers == 80 and (arch == "qwen2" or (arch == "llama" and shape.heads != shape.kv_heads))


def _fitting(columns: int, wanted: str) -> str:
    """`wanted`, or what llama.cpp falls back to for rows of `columns`."""
    if columns % BLOCKS[wanted][0] == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, wanted)
    return "F16" if columns % BLOCKS[smaller][0] else smaller


def _described(shape: ModelShape, model_name: str) -> Any:
    """A GGUFWriter with all keys but the vocabulary's, as export.gguf fills it."""
    import gguf

    target = TARGETS[shape.model_type]
    writer = gguf.GGUFWriter(None, target.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name)
    describe(writer, shape, target)
    writer.add_file_type(0)
    writer.add_quantization_version(2)
    return writer


@lru_cache(maxsize=4)
def _vocabulary_bytes(folder: Path, rows: int, _: tuple[str, ...]) -> int:
    """Bytes of the vocabulary's keys: seconds for a large one, so remembered as long as no file changes."""
    import gguf

    writer = gguf.GGUFWriter(None, "")
    architecture = _key_bytes(writer)
    write_vocabulary(writer, read_vocabulary(folder, rows))
    return _key_bytes(writer) - architecture


def _key_bytes(writer: Any) -> int:
    """Bytes of a GGUFWriter's keys with their values."""
    return sum(
        8 + len(key.encode()) + 4 + _value_bytes(entry.value, int(entry.type))
        for key, entry in writer.kv_data[0].items()
    )


def _value_bytes(value: Any, kind: int) -> int:
    import gguf

    if kind == TEXT:
        return 8 + len(value.encode() if isinstance(value, str) else value)
    if kind != LIST:
        return NUMBER_BYTES[kind]
    inner = int(gguf.GGUFValueType.get_type(value[0]))
    return 4 + 8 + sum(_value_bytes(item, inner) for item in value)


def _stored(size: tuple[int, ...], kind: str) -> int:
    weights, count = BLOCKS[kind]
    return prod(size) // weights * count


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
