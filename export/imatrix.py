"""Stage export.imatrix: which columns of each matrix matter to this model on this text, for export.quantize.

A quantiser that knows how large the numbers are that meet a column can spend its error where they are small.
So the squares of every linear layer's inputs are summed by column while the model reads a calibration text:

    in_sum2[j] = sum over tokens of x[j]^2        counts = tokens

The file is what llama.cpp's own tool llama-imatrix writes, and its tools read ours. The text is cut as that
tool cuts it: documents joined by an empty line and tokenised as one, special tokens in them as plain letters;
chunks of `context_tokens`, the rest dropped. Where the tokenizer adds a beginning token, it replaces the first
token of each chunk. Every matrix of a block has its entry; the embedding and the output matrix have none.

What differs. That tool adds up in float32, row by row: 8e-6 of a sum after 4,000 tokens, 6e-4 after 280,000;
here sums are float64. Left to itself it keeps keys and values in float16, which moves single columns by 1e-3;
ggml's GELU is a table in float16, which moves Gemma's by 5e-4. It leaves out the last tokens of a chunk where
fewer than 16 of them are left for a micro-batch (chunks of 513 to 527 tokens), and wants two chunks, where one
is enough here.

It chooses no text. Calibrate on what the model will read, and never on the text that a verification holds out.
Source: llama.cpp, tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from export.tokenizer.vocabulary import read_vocabulary
from export.weights.architectures import TARGETS, gguf_names
from foundation.dataio import documents
from foundation.errors import InputError, ModelError
from foundation.files import write_atomic, writing
from foundation.model import load
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

BATCH_TOKENS = 2048  # in one forward pass, as in llama-imatrix; activations only, no logits are made
SAVED_CHUNKS = 32  # between two savings of the sums: the most a kill can cost
SEPARATOR = "\n\n"  # between documents


class Settings(StageSettings):
    """How much text the model reads, and how."""

    context_tokens: int = Field(
        512, ge=16, description="tokens of a chunk; the model's own context if that is shorter"
    )
    chunks: int = Field(256, ge=0, description="most chunks that are read; 0 = all of the text")
    precision: Literal["fp32", "bf16", "nf4"] = Field(
        "fp32", description="of the model's weights; a GPU wants bf16, or nf4 (4 bits, bitsandbytes)"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read roles `model` and `texts`, write out/imatrix.gguf.

    Raises InputError when the text makes no chunk; ModelError for a kind of model or tokenizer that is not
    exported, one that does not fit the device, and one that computes NaN or infinity; StopRequested with the
    sums on disk.
    """
    folder, texts = one(inputs, "model"), many(inputs, "texts")
    shape = ModelShape.from_folder(folder)
    context = min(settings.context_tokens, shape.context)
    chunks = read_chunks(folder, shape.vocab, texts, context, settings.chunks)  # [chunks, context]
    names = collected(shape)
    sums = Sums(dict(names.values()), out / ".work" / "sums.safetensors")
    sums.resume(len(chunks), report)
    if sums.chunks < len(chunks):
        _read(load(folder, precision=settings.precision), names, chunks, sums, report)
    write(out / "imatrix.gguf", sums, context, [path.name for path in texts])
    return {"chunks": len(chunks), "tokens": chunks.size, "matrices": len(names)}


def collected(shape: ModelShape) -> dict[str, tuple[str, int]]:
    """Name of every linear layer of the blocks -> (its GGUF tensor, that tensor's columns)."""
    named = gguf_names(shape, TARGETS[shape.model_type])
    return {
        name.removesuffix(".weight"): (named[name], size[-1])
        for name, size in shape.tensors().items()
        if len(size) == 2 and named[name].startswith("blk.")
    }


# ---------------------------------------------------------------------------------------------------- the text


def read_chunks(folder: Path, rows: int, texts: Sequence[Path], context: int, most: int) -> np.ndarray:
    """Token ids of at most `most` (0: all) chunks of `context` tokens of `texts`.  # [chunks, context]

    rows: those of the embedding. Of several texts the documents are taken in turn: a limit cuts all of them.
    Raises InputError when the text has fewer tokens than a chunk.
    """
    import numpy as np

    tokenizer, vocabulary = Tokenizer(folder), read_vocabulary(folder, rows)
    bos = [vocabulary.ids["bos"]] if vocabulary.add_bos else []
    needed, counted, taken = (most + 1) * context, 0, []  # one chunk more: joining can save tokens
    for document in _in_turn(texts):
        taken.append(document)
        if most and (counted := counted + len(tokenizer.encode(document))) >= needed:
            break
    ids = bos + tokenizer.encode(SEPARATOR.join(taken))
    count = min(len(ids) // context, most or len(ids))
    if not count:
        raise InputError(
            f"{', '.join(path.name for path in texts)}: {len(ids)} tokens, a chunk is {context}",
            hint="give more text (100 chunks and more are usual), or a lower context_tokens",
        )
    chunks = np.array(ids[: count * context], np.int64).reshape(count, context)
    if bos:
        chunks[:, 0] = bos[0]
    return chunks


def _in_turn(texts: Sequence[Path]) -> Iterator[str]:
    """The documents of all texts: the first of each, the second of each, ..."""
    sources = [documents([path]) for path in texts]
    while sources:
        for source in list(sources):
            document = next(source, None)
            if document is None:
                sources.remove(source)
            else:
                yield document


# ---------------------------------------------------------------------------------------------------- the sums


class Sums:
    """Squares summed by column over the first `chunks` chunks, by GGUF tensor, and the file that keeps them."""

    def __init__(self, columns: dict[str, int], saved: Path) -> None:
        import torch

        self.chunks, self._saved = 0, saved
        self.by_name = {name: torch.zeros(size, dtype=torch.float64) for name, size in columns.items()}

    def resume(self, most: int, report: Report) -> None:
        """Go on from what was saved for the same text and model; a file that is damaged is passed over."""
        from safetensors import SafetensorError, safe_open

        if not self._saved.is_file():
            return
        try:
            with safe_open(str(self._saved), framework="pt") as file:
                found = {name: file.get_tensor(name) for name in self.by_name}
                chunks = int((file.metadata() or {})["chunks"])
        except (SafetensorError, KeyError, ValueError):
            found, chunks = {}, 0
        kinds = {name: (column.shape, column.dtype) for name, column in self.by_name.items()}
        if chunks > most or kinds != {name: (column.shape, column.dtype) for name, column in found.items()}:
            report.note(f"{self._saved.name} is damaged or of another model; the text is read from its start")
            return
        self.by_name, self.chunks = found, chunks

    def save(self) -> None:
        """Put them on the disk, whole or not at all."""
        from safetensors.torch import save

        self._saved.parent.mkdir(parents=True, exist_ok=True)
        held = {name: column.cpu() for name, column in sorted(self.by_name.items())}
        write_atomic(self._saved, save(held, {"chunks": str(self.chunks)}))

    def add(self, name: str, activations: torch.Tensor) -> None:
        """Add the squares of a layer's inputs.  # [..., columns]"""
        import torch

        squares = activations.detach().float().square().flatten(0, -2)  # [tokens, columns]
        self.by_name[name] += squares.sum(0, dtype=torch.float64)

    def to(self, device: Any) -> None:
        """Sum on `device` from now on."""
        self.by_name = {name: column.to(device) for name, column in self.by_name.items()}

    def check(self) -> None:
        """Raise ModelError naming the first matrix whose input was no number."""
        import torch

        for name, column in self.by_name.items():
            if not torch.isfinite(column).all():
                raise ModelError(
                    f"the input of {name} holds NaN or infinity within the first {self.chunks} chunks",
                    hint="its training diverged, or precision is too low",
                )


def _read(
    model: Any,
    names: dict[str, tuple[str, int]],
    chunks: np.ndarray,
    sums: Sums,
    report: Report,
) -> None:
    """Send the chunks that are missing through the model.

    Whole batches are saved, so a run that goes on makes the same ones and comes to the same sums.
    """
    import torch

    rows = max(1, BATCH_TOKENS // chunks.shape[1])
    sums.to(model.device)
    unsaved = 0
    with _hooks(model, names, sums), torch.inference_mode():
        for start in range(sums.chunks, len(chunks), rows):
            batch = torch.from_numpy(chunks[start : start + rows]).to(model.device)  # [B, T]
            try:
                model.base_model(input_ids=batch, use_cache=False)
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"the model and {batch.numel()} tokens of text do not fit the device's memory",
                    hint="take precision = 'bf16' or 'nf4', or a lower context_tokens",
                ) from None
            sums.chunks += len(batch)
            unsaved += len(batch)
            report.progress(sums.chunks, len(chunks), "chunk")
            stops = report.stop_requested()
            if stops or unsaved >= SAVED_CHUNKS or sums.chunks == len(chunks) or report.checkpoint_requested():
                sums.check()
                sums.save()
                unsaved = 0
            if stops:
                stop_if_asked(report)


@contextmanager
def _hooks(model: Any, names: dict[str, tuple[str, int]], sums: Sums) -> Iterator[None]:
    """While it lasts, every linear layer of `names` adds its input to the sums."""

    def adding(name: str) -> Any:
        return lambda _, args: sums.add(name, args[0])

    handles = [
        model.get_submodule(layer).register_forward_pre_hook(adding(gguf)) for layer, (gguf, _) in names.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------- the file


def write(path: Path, sums: Sums, context: int, datasets: Sequence[str]) -> None:
    """Write the matrix as llama-imatrix does: the same keys, entries sorted by name, everything float32."""
    import gguf
    import numpy as np

    partial = path.parent / ".work" / path.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "imatrix")
    writer.kv_data[0].clear()  # gguf-py names an architecture, which an importance matrix has not
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(datasets))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, sums.chunks)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, context)
    tokens = np.array([sums.chunks * context], np.float32)
    for name, column in sorted(sums.by_name.items()):
        writer.add_tensor(f"{name}.in_sum2", column.cpu().numpy().astype(np.float32))
        writer.add_tensor(f"{name}.counts", tokens)
    with writing(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
