"""How many bytes a model's GGUF file will have, before anything is written: exact, from config and tokenizer.

So the pruning loop can ask how many layers fit a file size. No weights are read, and the model's layers may be
fewer than it has (`layers`): what a file weighs depends on how many are left, not on which.

What lies where is the arithmetic of weights/layout.py, and the keys are those that export.gguf writes. Which
types a mix gives to the matrices is llama.cpp's to say: it is asked for its plan (quantiser.py) of a stub, a
GGUF file with the model's keys and tensor table and a hole for the weights. That takes milliseconds.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from export.about import About
from export.gguf import FILE_TYPES, described, tensors_of, vocabulary_keys
from export.quants.importance import Importance
from export.quants.quantiser import Wish, plan
from export.quants.types import QUANTS, check_quant
from export.tokenizer.vocabulary import read_vocabulary
from export.weights.architectures import Target, check, gguf_names
from export.weights.layout import Keys, Layout, Tensor
from foundation.errors import ModelError
from foundation.files import stamps
from foundation.shape import ModelShape


def gguf_bytes(folder: Path, kind: str, layers: int | None = None, *, model_name: str = "model") -> int:
    """Bytes of the file that export.gguf and export.quantize make of the model in `folder` as `kind`.

    kind: a name in types.QUANTS. With an importance matrix a file has some hundred bytes more, which
    tell of it, and of some types slightly other matrices; types that need one are counted so, but for those
    bytes. layers: as if so many of its layers were left; for Gemma 3 one with a sliding window among them
    (without any, the file is some hundred bytes smaller). model_name: general.name.
    Raises ModelError: what can not be exported, an unknown kind, one that llama.cpp can not make of these rows,
    more layers than there are.
    """
    try:
        check_quant(kind)
    except ValueError as error:
        raise ModelError(str(error)) from error
    shape = ModelShape.from_folder(folder)
    if layers is not None:
        shape = shape.with_layers(layers)
    target = check(shape)
    keys = Keys.of(described(folder, shape, target, About(name=model_name), "f32"))
    keys += _vocabulary_keys(folder, shape.vocab, tuple(map(str, stamps(folder).items())))
    return Layout(keys, tensors_as(shape, target, kind)).size_bytes


def tensors_as(shape: ModelShape, target: Target, kind: str) -> list[Tensor]:
    """The tensors of a file of type `kind`, as llama.cpp means to make them."""
    origins = {new: old for old, new in gguf_names(shape, target).items()}
    if kind.lower() in FILE_TYPES:
        return tensors_of(shape, origins, kind.lower())
    tensors = tensors_of(shape, origins, "bf16")
    with tempfile.TemporaryDirectory(prefix="samovar-") as folder:
        stub = Path(folder) / "stub.gguf"
        keys = Keys.of(described(Path(folder), shape, target, About(), "bf16"))
        (file,) = Layout(keys, tensors).files
        with stub.open("wb") as written:
            written.write(file.head)
            written.truncate(file.size_bytes)
        matrix = Importance("", (), 0, {}) if QUANTS[kind].needs_imatrix else None
        types = plan(stub, Wish(kind, importance=matrix))
    return [replace(tensor, type=types[tensor.name]) for tensor in tensors]


@lru_cache(maxsize=4)
def _vocabulary_keys(folder: Path, rows: int, _: tuple[str, ...]) -> Keys:
    """The vocabulary's keys: seconds for a large one, so remembered as long as no file changes."""
    return vocabulary_keys(read_vocabulary(folder, rows))
