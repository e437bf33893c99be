"""Stage export.gguf: a Hugging Face folder becomes one GGUF file that llama.cpp runs.

Needs neither torch nor transformers. One tensor is in memory at a time. The same folder gives the same
bytes: no times, no paths. Norms and biases stay F32. What llama.cpp can not compute or tokenise like
the original is refused; export.verify then proves the rest on logits and texts.

Source: the GGUF specification and gguf-py; llama.cpp's convert_hf_to_gguf.py is the reference, never
shipped, and fails on the extended tokenizers that this project makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from export.architectures import check, describe, rope_divisors, tensor_names, weights
from export.checkpoint import Checkpoint
from export.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from foundation.errors import ModelError
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, one

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # general.file_type
NAMED_BY_LLAMA_CPP = ("phi-3", "phi3", "modern-bert")  # a name with these changes how it matches special tokens


class Settings(StageSettings):
    """Settings of export.gguf."""

    dtype: Literal["f32", "f16", "bf16"] = Field("f32", description="type of the matrices; norms stay f32")
    model_name: str = Field("model", description="general.name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read role `model`, write `out`/model.gguf. Raises ModelError for what can not be exported."""
    folder = one(inputs, "model")
    if any(part in settings.model_name.lower() for part in NAMED_BY_LLAMA_CPP):
        raise ModelError(
            f"the name {settings.model_name!r} makes llama.cpp treat special tokens in its own way"
        )
    shape = ModelShape.from_folder(folder)
    target = check(shape)
    checkpoint = Checkpoint(folder)
    names = tensor_names(shape, target, checkpoint)
    vocabulary = read_vocabulary(folder, shape.vocab)
    for note in vocabulary.notes:
        report.note(note)
    partial = out / ".work" / "model.gguf"
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = _writer(partial, settings.model_name, target.arch, vocabulary)
    describe(writer, shape, target)
    writer.add_file_type(FILE_TYPES[settings.dtype])
    writer.add_quantization_version(2)
    divisors = rope_divisors(shape)
    if divisors:
        _announce(writer, "rope_freqs.weight", (len(divisors),), "f32")
    for name, size in shape.tensors().items():
        _announce(writer, names[name], size, settings.dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors:
        writer.write_tensor_data(_stored(divisors, "f32", "rope_freqs.weight"))
    for done, (name, values) in enumerate(weights(shape, target, checkpoint), 1):
        writer.write_tensor_data(_stored(values, settings.dtype, name))
        report.progress(done, len(names), "tensor")
        stop_if_asked(report)
    writer.close()
    partial.replace(out / "model.gguf")
    return {
        "architecture": target.arch,
        "tokenizer": f"{vocabulary.model}/{vocabulary.pre}",
        "parameters": shape.parameters(),
        "size_bytes": (out / "model.gguf").stat().st_size,
    }


def write_vocabulary_only(path: Path, vocabulary: Vocabulary) -> None:
    """A GGUF file with a tokenizer and no weights, which llama.cpp opens with vocab_only."""
    writer = _writer(path, "vocabulary", "llama", vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _writer(path: Path, name: str, arch: str, vocabulary: Vocabulary) -> Any:
    """A GGUFWriter that has the general and the tokenizer keys."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    write_vocabulary(writer, vocabulary)
    return writer


def _announce(writer: Any, name: str, size: tuple[int, ...], dtype: str) -> None:
    """Tell the writer of a tensor whose values come later."""
    import gguf
    import numpy as np

    kinds = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    kind = kinds.get(dtype, gguf.GGMLQuantizationType.BF16) if len(size) > 1 else kinds["f32"]
    item = 4 if kind is kinds["f32"] else 2
    writer.add_tensor_info(name, size, np.dtype(np.float32), int(np.prod(size)) * item, raw_dtype=kind)


def _stored(values: Any, dtype: str, name: str) -> Any:
    """Values as a numpy array of what lies in the file. Raises ModelError when float16 can not hold them."""
    import gguf
    import numpy as np

    values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():
        raise ModelError(f"{name} holds infinite or undefined numbers", hint="its training diverged")
    if values.ndim < 2 or dtype == "f32":
        return values
    if dtype == "bf16":
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise ModelError(f"{name} holds {np.abs(values).max():g}, too much for f16", hint="use bf16 or f32")
    return values.astype(np.float16)
