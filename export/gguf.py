"""Stage export.gguf: a Hugging Face folder becomes a GGUF file, or several, that llama.cpp runs.

    gguf/model.gguf   or   gguf/model-00001-of-00003.gguf ...   above `shard_bytes`

Needs neither torch nor transformers. Some rows of a tensor are in memory at a time, whatever the model's size.
The same folder gives the same bytes: no times, no paths. Norms and biases stay F32. What llama.cpp can not
compute or tokenise like the original is refused; export.verify then proves the rest on logits and texts.

Source: the GGUF specification and gguf-py; llama.cpp's convert_hf_to_gguf.py is the reference, never
shipped, and fails on the extended tokenizers that this project makes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from export import about
from export.about import About
from export.tokenizer.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from export.weights.architectures import (
    Target,
    capped,
    check,
    check_tied,
    describe,
    rope_divisors,
    rows,
    tensor_names,
)
from export.weights.checkpoint import Checkpoint
from export.weights.layout import Keys, Layout, Tensor
from export.weights.writer import NO_SPACE, write_files
from foundation.errors import ModelError
from foundation.files import check_space
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, one

if TYPE_CHECKING:
    import numpy as np

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # general.file_type
NAMED_BY_LLAMA_CPP = ("phi-3", "phi3", "modern-bert")  # a name with these changes how it matches special tokens
ROPE_DIVISORS = "rope_freqs.weight"
Q8_0_BLOCK = 32


class Settings(StageSettings):
    """Settings of export.gguf. What is told of the model and left empty comes from the folder's README.md."""

    dtype: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        "f32", description="type of the matrices; norms stay f32"
    )
    shard_bytes: int = Field(0, ge=0, description="most bytes of weights in one file; 0 writes one file")
    cap_context: bool = Field(
        False,
        description="cap the context to the sliding window, where llama.cpp would ignore windows; else refuse",
    )
    model_name: str = Field("model", description="general.name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
    license: str = Field("", description="SPDX id of the weights' licence", pattern=r"^[\w.+-]*$")
    license_link: str = Field("", description="where the licence's text lies")
    base_models: tuple[str, ...] = Field((), description="models it was made from: ids on the Hub, or URLs")
    datasets: tuple[str, ...] = Field((), description="what it was trained on: ids on the Hub, or URLs")
    languages: tuple[str, ...] = Field((), description="ISO 639-1 codes")
    description: str = Field("", description="one line about the model")

    def about(self) -> About:
        return About(
            name=self.model_name,
            license=self.license,
            license_link=self.license_link,
            base_models=self.base_models,
            datasets=self.datasets,
            languages=self.languages,
            description=self.description,
        )


@dataclass(frozen=True)
class Plan:
    """An export of which everything is known and nothing written."""

    layout: Layout
    shape: ModelShape
    target: Target
    checkpoint: Checkpoint
    vocabulary: Vocabulary
    origins: dict[str, str]  # name in GGUF -> name in the checkpoint
    notes: list[str]  # what the user should know

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Blocks of rows of a tensor by its name in GGUF."""
        import numpy as np

        if name == ROPE_DIVISORS:
            return iter([np.array(rope_divisors(self.shape), np.float32)])
        return rows(self.origins[name], self.shape, self.target, self.checkpoint)


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read role `model`, write `out`/gguf. Raises ModelError: what can not be exported; RunError: disk full."""
    plan = planned(settings, one(inputs, "model"))
    for note in plan.notes:
        report.note(note)
    partial, final = out / ".work" / "gguf", out / "gguf"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
    partial.mkdir(parents=True)
    check_space(partial, plan.layout.size_bytes, NO_SPACE)
    write_files(plan.layout, plan.rows, partial, report, origins=plan.origins)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    return {
        "architecture": plan.target.arch,
        "tokenizer": f"{plan.vocabulary.model}/{plan.vocabulary.pre}",
        "parameters": plan.shape.parameters(),
        "files": len(plan.layout.files),
        "size_bytes": plan.layout.size_bytes,
    }


def planned(settings: Settings, folder: Path) -> Plan:
    """What `settings` make of `folder`, all names and sizes checked. Raises ModelError as `run`."""
    if any(part in settings.model_name.lower() for part in NAMED_BY_LLAMA_CPP):
        raise ModelError(
            f"the name {settings.model_name!r} makes llama.cpp treat special tokens in its own way"
        )
    shape, notes = ModelShape.from_folder(folder), []
    if settings.cap_context and (smaller := capped(shape)) is not shape:
        notes.append(
            f"the context is capped from {shape.context} to {smaller.context} tokens, one sliding window"
        )
        shape = smaller
    target = check(shape)
    checkpoint = Checkpoint(folder)
    origins = {new: old for old, new in tensor_names(shape, target, checkpoint).items()}
    check_tied(shape, checkpoint)
    vocabulary = read_vocabulary(folder, shape.vocab)
    tensors = tensors_of(shape, origins, settings.dtype)
    odd = [t for t in tensors if settings.dtype == "q8_0" and t.type == "F16"]
    if odd:
        notes.append(f"{len(odd)} matrices are f16: their rows are no multiple of {Q8_0_BLOCK}")
    keys = Keys.of(described(folder, shape, target, settings.about(), settings.dtype))
    layout = Layout(keys + vocabulary_keys(vocabulary), tensors, settings.shard_bytes)
    return Plan(layout, shape, target, checkpoint, vocabulary, origins, vocabulary.notes + notes)


def tensors_of(shape: ModelShape, origins: dict[str, str], dtype: str) -> list[Tensor]:
    """All tensors in file order. origins: name in GGUF -> name in the checkpoint; dtype: of the matrices."""
    divisors = rope_divisors(shape)
    first = [Tensor(ROPE_DIVISORS, (len(divisors),), "F32")] if divisors else []
    sizes = shape.tensors()
    return first + [Tensor(new, sizes[old], stored_type(sizes[old], dtype)) for new, old in origins.items()]


def stored_type(size: tuple[int, ...], dtype: str) -> str:
    """ggml's name of a tensor's type. Rows without whole blocks become F16, as llama.cpp's converter has it."""
    if len(size) == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and size[-1] % Q8_0_BLOCK else dtype.upper()


def described(folder: Path, shape: ModelShape, target: Target, told: About, dtype: str) -> Any:
    """A GGUFWriter with all keys but the vocabulary's."""
    import gguf

    writer = gguf.GGUFWriter(None, target.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    parameters = shape.parameters() + len(rope_divisors(shape) or ())
    about.write(about.of_folder(folder, told), writer, parameters)
    about.write_sampling(folder, writer)
    describe(writer, shape, target)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def vocabulary_keys(vocabulary: Vocabulary) -> Keys:
    """The keys of the vocabulary alone."""
    import gguf

    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # the architecture
    write_vocabulary(writer, vocabulary)
    return Keys.of(writer)


def write_vocabulary_only(path: Path, vocabulary: Vocabulary) -> None:
    """A GGUF file with a tokenizer and no weights, which llama.cpp opens with vocab_only."""
    import gguf

    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("vocabulary")
    (file,) = Layout(Keys.of(writer) + vocabulary_keys(vocabulary), []).files
    path.write_bytes(file.head)
