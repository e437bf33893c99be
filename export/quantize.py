"""Stage export.quantize: smaller copies of a GGUF file, made by llama.cpp's own quantiser in a child process.

A name such as Q4_K_M is a mix of several types, and a matrix whose rows are no multiple of a block silently
gets another one. So the types are read back from each result: quantize.json tells the real bits per weight
and every fallback. Small models lose much of the promised saving this way.

Everything that can be refused is refused before the first file: the quantiser is asked for its plan of each
type, which needs no weights and tells the exact sizes. `dry` stops there.

An importance matrix (stage export.imatrix, or llama.cpp's llama-imatrix) says which columns matter; types of
about three bits and fewer are not made without one. Files are those of llama.cpp's own llama-quantize, byte
for byte, but that they name the importance matrix without its folder.
Source: llama.cpp, tools/quantize and src/llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from export import ggufs
from export.quants import importance
from export.quants.importance import Importance
from export.quants.overrides import CHARACTERS, resolve
from export.quants.quantiser import Wish, plan, write
from export.quants.types import QUANTS, UNQUANTISED, block, check_quant, check_type
from export.weights.layout import Keys, Layout, Tensor
from export.weights.writer import NO_SPACE
from foundation import gguf_header
from foundation.child import in_child
from foundation.errors import ModelError
from foundation.files import check_space, write_json
from foundation.llama import LlamaModel
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, Reads, many, one

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
HEADER_BYTES = 24  # before the keys: magic, version, number of tensors, number of keys
NUMBER_BYTES = {2: 2, 4: 4, 5: 4}  # of the numbers that split.* are: uint16, uint32, int32


class Settings(StageSettings):
    """Settings of export.quantize."""

    types: tuple[str, ...] = Field(("Q8_0", "Q4_K_M"), description="file types to make", min_length=1)
    tensor_types: dict[str, str] = Field(
        {},
        description="tensor type by name: a whole name, a part of names, or a name with * for any letters; "
        "the first that fits a matrix counts",
    )
    output_type: str | None = Field(None, description="tensor type of the output matrix")
    embedding_type: str | None = Field(None, description="tensor type of the embedding")
    pure: bool = Field(False, description="all matrices in the one type that most of the mix have")
    dry: bool = Field(False, description="write no file, tell the sizes in quantize.json")

    @field_validator("types")
    @classmethod
    def _types(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_quant(name)
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join(names)} names a type twice")
        return names

    @field_validator("tensor_types")
    @classmethod
    def _tensor_types(cls, patterns: dict[str, str]) -> dict[str, str]:
        for pattern, kind in patterns.items():
            if not CHARACTERS.fullmatch(pattern):
                raise ValueError(
                    f"{pattern[:80]!r} is no name of a tensor; letters, digits, '.', '_', '-' and '*' are "
                    "allowed, and no regular expressions: 'blk.*.ffn_down.weight'"
                )
            check_type(kind)
        return patterns

    @field_validator("output_type", "embedding_type")
    @classmethod
    def _type(cls, name: str | None) -> str | None:
        return name and check_type(name)


def disagreements(settings: Settings, reads: Reads) -> list[str]:
    """What can not go together in a recipe."""
    problems = []
    if "imatrix" not in reads:
        problems += _without_importance(settings)
    plain = [name for name in settings.types if name in UNQUANTISED]
    idle = [name for name in ("tensor_types", "pure") if getattr(settings, name)]
    if plain and idle:
        problems.append(f"{' and '.join(idle)} change nothing of {', '.join(plain)}, which are no mixes")
    return problems


def written(settings: Settings) -> tuple[str, ...]:
    """Roles that a stage with these settings writes: one for each type, the folder of all, the report."""
    files = () if settings.dry else ("all", *(name.lower() for name in settings.types))
    return ("report", *files)


def _without_importance(settings: Settings) -> list[str]:
    return [
        f"{name} needs an importance matrix, given as `imatrix`: llama.cpp makes nothing good without one"
        for name in settings.types
        if QUANTS[name].needs_imatrix and not settings.pure
    ]


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read role `gguf` (F32, F16 or BF16) and, where given, `imatrix`; write gguf/NAME.gguf and quantize.json.

    Raises ModelError: a source that is quantised already or damaged, an importance matrix of another model or
    none where one is needed, names that fit no matrix; RunError: no space on the disk.
    """
    imatrix = one(inputs, "imatrix") if many(inputs, "imatrix") else None
    if problems := disagreements(settings, {"imatrix": ()} if imatrix else {}):
        raise ModelError("; ".join(problems), hint="add a stage export.imatrix, or choose other types")
    told = in_child(
        "export.quantize:make",
        {
            "source": str(gguf_header.find(one(inputs, "gguf"))),
            "imatrix": str(imatrix) if imatrix else None,
            "out": str(out),
            "settings": settings.model_dump(mode="json"),
        },
        report,
    )
    write_json(out / "quantize.json", told)
    figures: Figures = {}
    for name, row in told["files"].items():
        figures[f"{name.lower()}_bits_per_weight"] = row["bits_per_weight"]
        figures[f"{name.lower()}_bytes"] = row["size_bytes"]
    return figures


def make(
    source: str, imatrix: str | None, out: str, settings: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """What quantize.json says, and the files unless `dry`: the part of `run` that llama.cpp could end.

    A file that an earlier try has finished is taken as it is.
    """
    asked = Settings.model_validate_json(_json(settings))
    work = _Work.of(Path(source), asked, importance.read(Path(imatrix)) if imatrix else None)
    folder, scratch = Path(out) / "gguf", Path(out) / ".work"
    missing = [job for job in work.jobs if _size(folder / job.file) != job.size_bytes]
    if not asked.dry and missing:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(job.size_bytes for job in missing), NO_SPACE)
    rows = {}
    for number, job in enumerate(work.jobs):
        stop_if_asked(report)
        if job in missing and not asked.dry:
            _quantise(work.source, scratch / job.file, folder / job.file, job, number, len(work.jobs), report)
        table = job.tensors if asked.dry else ggufs.tensors(folder / job.file)
        size = job.size_bytes if asked.dry else _size(folder / job.file)
        rows[job.wish.quant] = row = _row(job, table, size)
        if row["fallbacks"]:
            report.note(f"{job.wish.quant}: {len(row['fallbacks'])} of {len(table)} tensors got another type")
    return {"source": work.quantisation, "dry": asked.dry, "files": rows}


@dataclass(frozen=True)
class _Job:
    """One file to make: what is wished, and what llama.cpp plans of it."""

    wish: Wish
    tensors: tuple[Tensor, ...]
    size_bytes: int

    @property
    def file(self) -> str:
        return f"{self.wish.quant.lower()}.gguf"


@dataclass(frozen=True)
class _Work:
    """All that is asked, checked."""

    source: Path
    quantisation: str
    jobs: tuple[_Job, ...]

    @classmethod
    def of(cls, source: Path, settings: Settings, matrix: Importance | None) -> _Work:
        """Raises ModelError for all that llama.cpp would refuse, or end the process on."""
        table = ggufs.tensors(source)
        kind = ggufs.quantisation(source)
        packed = sorted({t.type for t in table} - set(UNQUANTISED))
        if kind not in UNQUANTISED or packed:
            raise ModelError(
                f"{source.name} is {kind} already, with {', '.join(packed)} in it",
                hint="quantise the F32, F16 or BF16 file that export.gguf writes: twice loses twice",
            )
        LlamaModel(source, vocab_only=True).close()  # a file llama.cpp refuses is refused before any work
        columns = {t.name: t.shape[-1] for t in table if len(t.shape) > 1}
        if matrix:
            importance.check(matrix, columns)
        overrides = resolve(settings.tensor_types, columns)
        _refuse_idle(settings, columns, overrides)
        jobs = []
        for name in settings.types:
            wish = Wish(name, overrides, settings.output_type, settings.embedding_type, settings.pure, matrix)
            planned = plan(source, wish)
            if planned.keys() != {t.name for t in table}:
                raise ModelError(f"llama.cpp reads other tensors in {source.name} than its table names")
            _refuse_without_importance(planned, wish)
            tensors = tuple(Tensor(t.name, t.shape, planned[t.name]) for t in table)
            jobs.append(_Job(wish, tensors, _file_bytes(source, tensors, matrix)))
        return cls(source, kind, tuple(jobs))


def _quantise(
    source: Path, partial: Path, target: Path, job: _Job, number: int, count: int, report: Report
) -> None:
    """One file, which appears under its name when it is whole."""
    tensors = len(job.tensors)
    try:
        write(
            source,
            partial,
            job.wish,
            lambda done: report.progress(number * tensors + done, count * tensors, "tensor"),
        )
    except ModelError:
        # llama.cpp says of a full disk: iostream error
        check_space(partial.parent, job.size_bytes - _size(partial), NO_SPACE)
        raise
    partial.replace(target)


def _refuse_idle(settings: Settings, columns: Mapping[str, int], overrides: Mapping[str, str]) -> None:
    """Wishes that would change nothing, or on which llama.cpp would end the process."""
    problems = []
    tied = OUTPUT not in columns
    for key, kind, name in (
        ("output_type", settings.output_type, EMBEDDING if tied else OUTPUT),
        ("embedding_type", settings.embedding_type, EMBEDDING),
    ):
        if kind and name in overrides:
            problems.append(f"tensor_types and {key} both say what {name} shall be")
        row = columns.get(name, 0)
        if kind and row % block(kind)[0]:
            problems.append(f"{key} {kind} has blocks of {block(kind)[0]}, rows of {name} are {row}")
    if settings.output_type and tied:
        plain = [name for name in settings.types if name in UNQUANTISED]
        if settings.embedding_type or settings.pure or plain:
            other = "embedding_type" if settings.embedding_type else "pure" if settings.pure else plain[0]
            problems.append(f"the output matrix is the embedding, and with {other} output_type is not used")
    if problems:
        raise ModelError("; ".join(problems), hint="leave one out, or choose another type")


def _refuse_without_importance(planned: Mapping[str, str], wish: Wish) -> None:
    """Matrices that llama.cpp would refuse half way, or end the process on, for they have no entry."""
    means = wish.importance.means if wish.importance else {}
    bare = [
        f"{name} as {kind}"
        for name, kind in planned.items()
        if name not in means and _needs_importance(name, kind, wish.quant)
    ]
    if bare:
        more = f" and {len(bare) - 3} more" if len(bare) > 3 else ""
        raise ModelError(
            f"{wish.quant} needs an importance matrix for {', '.join(bare[:3])}{more}",
            hint="give one as `imatrix`; it has none for the embedding and the output matrix, which can get "
            "another type by embedding_type and output_type",
        )


def _needs_importance(name: str, kind: str, quant: str) -> bool:
    """llama.cpp's rule. Source: tensor_requires_imatrix, and ggml_quantize_requires_imatrix for any matrix."""
    if kind in ("IQ1_S", "IQ2_XXS", "IQ2_XS"):
        return True
    if name in (EMBEDDING, OUTPUT):
        return False
    return kind in ("IQ1_M", "IQ2_S", "IQ3_XXS") or (kind, quant) == ("Q2_K", "Q2_K_S")


def _file_bytes(source: Path, tensors: Sequence[Tensor], matrix: Importance | None) -> int:
    """Of the file with these tensors and the source's keys, which are one or two less or more."""
    header = gguf_header.header(source)
    keys = header.keys_bytes
    for key, kind in header.kinds.items():
        if key.startswith("split."):
            keys -= _key_bytes(key, NUMBER_BYTES[kind])
    gained: dict[str, str | int] = {"general.file_type": 0, "general.quantization_version": 0}
    for key, value in (gained | (matrix.keys() if matrix else {})).items():
        if key not in header.kinds:
            keys += _key_bytes(key, 8 + len(value.encode()) if isinstance(value, str) else 4)
    return Layout(Keys(0, bytes(keys - HEADER_BYTES)), tensors).size_bytes


def _key_bytes(key: str, value: int) -> int:
    return 8 + len(key.encode()) + 4 + value


def _row(job: _Job, table: Sequence[Tensor], size: int) -> dict[str, Any]:
    """What a file holds. A fallback is a matrix of a type that was neither meant by the mix nor asked for."""
    types: dict[str, int] = {}
    for tensor in table:
        types[tensor.type] = types.get(tensor.type, 0) + 1
    tied = all(tensor.name != OUTPUT for tensor in table)
    return {
        "file": job.file,
        "size_bytes": size,
        "bits_per_weight": round(ggufs.bits_per_weight(list(table)), 3),
        "types": types,
        "fallbacks": [
            {"tensor": t.name, "type": t.type, "columns": t.shape[-1]}
            for t in table
            if len(t.shape) > 1 and t.type not in _meant(t.name, job.wish, tied)
        ],
    }


def _meant(name: str, wish: Wish, tied: bool) -> tuple[str, ...]:
    """Types that a matrix may have by the wish."""
    if name == EMBEDDING and wish.embedding_type:
        return (wish.embedding_type,)
    if name == (EMBEDDING if tied else OUTPUT) and wish.output_type:
        return (wish.output_type,)
    if name in wish.overrides:
        return (wish.overrides[name],)
    types = QUANTS[wish.quant].types
    return types[:1] if wish.pure else types


def _size(path: Path) -> int:
    """Bytes of the file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _json(settings: Mapping[str, Any]) -> str:
    import json

    return json.dumps(dict(settings))
