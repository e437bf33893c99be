"""Stage export.bundle: the folder that ships. Whoever gets it needs nothing else.

    bundle/
      bundle.json           name, file to serve, tokenizer digest, every file's size and sha256
      gguf/NAME-QUANT.gguf  for llama.cpp and what is built on it
      hf/                   the checkpoint: for other engines, and for training on
      chat_template.jinja   generation.json   README.md   Modelfile   LICENSES/

No times and no paths of this machine: the same inputs give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from export import card, ggufs
from export.card import Facts, Quantised
from foundation.errors import InputError, ModelError
from foundation.files import read_json, sha256_file, visible_files, write_json
from foundation.llama import LlamaModel
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer

FORMAT = 1
CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "*.jinja")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
SMALL_PARAMETERS = 1_500_000_000  # below it four bits cost quality and save little: Q8_0 is served


class Settings(StageSettings):
    """Settings of export.bundle."""

    model_name: str = Field(
        "model", description="name of the model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$"
    )
    license: str = Field("Apache-2.0", description="SPDX id of the weights' licence", pattern=r"^[\w.+-]+$")
    languages: tuple[str, ...] = Field(("ru", "en"), description="ISO 639-1 codes, for the model card")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read roles `model`, `gguf` (many), `verify`, `scores` (JSON, optional); write `out`/bundle."""
    folder, bundle = one(inputs, "model"), out / "bundle"
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no *.safetensors", hint="a bundle ships the checkpoint; give its folder")
    if bundle.exists():
        shutil.rmtree(bundle)  # an unfinished one
    bundle.mkdir(parents=True)
    shape, tokenizer = ModelShape.from_folder(folder), Tokenizer(folder)
    files = [_copy_gguf(path, settings.model_name, bundle) for path in _ggufs(many(inputs, "gguf"))]
    facts = Facts(
        name=settings.model_name,
        license=settings.license,
        languages=settings.languages,
        shape=shape,
        files=files,
        serve=_served(files, shape),
        verify=[_json(path, "verify.json") for path in many(inputs, "verify")],
        scores=[_json(path, "scores.json") for path in many(inputs, "scores")],
    )
    _copy(folder, CHECKPOINT_FILES, bundle / "hf")
    if tokenizer.chat_template:
        (bundle / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    with LlamaModel(bundle / facts.serve.path, vocab_only=True) as model:
        if model.vocab_size != shape.vocab:
            raise ModelError(f"{facts.serve.path} has {model.vocab_size} tokens, the model {shape.vocab}")
        stops = [model.piece(i).decode("utf-8", "replace") for i in sorted(model.eog)]
    write_json(bundle / "generation.json", _generation(folder, shape, stops))
    (bundle / "README.md").write_text(card.readme(facts), encoding="utf-8")
    (bundle / "Modelfile").write_text(card.modelfile(facts, tokenizer.chat_template, stops), encoding="utf-8")
    copied = _copy(folder, LICENCE_FILES, bundle / "LICENSES")
    (bundle / "LICENSES" / "README.txt").write_text(card.licences(facts, copied), encoding="utf-8")
    listing = _listing(bundle)
    write_json(bundle / "bundle.json", _index(facts, tokenizer, listing))
    report.note(f"{facts.serve.path} is the file to serve")
    return {
        "files": len(listing),
        "size_bytes": sum(entry["size_bytes"] for entry in listing),
        "serve": facts.serve.path,
    }


def _ggufs(paths: Iterable[Path]) -> list[Path]:
    """All GGUF files among `paths`, which are files or folders of them."""
    found = [file for path in paths for file in (sorted(path.glob("*.gguf")) if path.is_dir() else [path])]
    if not found:
        raise InputError("no GGUF file was given", hint="read the gguf of export.gguf or of export.quantize")
    return found


def _copy_gguf(path: Path, name: str, bundle: Path) -> Quantised:
    table, kind = ggufs.tensors(path), ggufs.quantisation(path)
    target = bundle / "gguf" / f"{name}-{kind}.gguf"
    if target.exists():
        raise InputError(f"two GGUF files of type {kind} were given")
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    return Quantised(
        path=target.relative_to(bundle).as_posix(),
        type=kind,
        size_bytes=target.stat().st_size,
        bits_per_weight=ggufs.bits_per_weight(table),
        gpu_bytes=ggufs.gpu_bytes(table),
    )


def _served(files: list[Quantised], shape: ModelShape) -> Quantised:
    """The file to serve: Q8_0 for small models, Q4_K_M for others, else the smallest there is."""
    best = "Q8_0" if shape.parameters() < SMALL_PARAMETERS else "Q4_K_M"
    return min(files, key=lambda file: (file.type != best, file.size_bytes))


def _copy(source: Path, patterns: Iterable[str], target: Path) -> list[str]:
    """Copy the files of `source` that match; their names."""
    target.mkdir(exist_ok=True)
    names = sorted({p.name for pattern in patterns for p in source.glob(pattern) if p.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _json(path: Path, name: str) -> dict[str, Any]:
    """A report: the file `path`, or `name` in the folder `path`."""
    file = path / name if path.is_dir() else path
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no JSON table")
    return value


def _generation(folder: Path, shape: ModelShape, stops: list[str]) -> dict[str, Any]:
    """How to sample, as the model's makers set it; greedy when they say nothing."""
    given = read_json(folder / "generation_config.json") or {}
    sampling = {key: given[key] for key in SAMPLING_KEYS if given.get(key) is not None}
    if not given.get("do_sample"):
        sampling["temperature"] = 0.0
    return {"context_tokens": shape.context, "stop": stops, **sampling}


def _listing(bundle: Path) -> list[dict[str, Any]]:
    """Path, size and digest of every file."""
    return [
        {"path": name, "size_bytes": (bundle / name).stat().st_size, "sha256": sha256_file(bundle / name)}
        for name in visible_files(bundle)
    ]


def _index(facts: Facts, tokenizer: Tokenizer, listing: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": facts.name,
        "license": facts.license,
        "languages": list(facts.languages),
        "architecture": facts.shape.model_type,
        "parameters": facts.shape.parameters(),
        "context_tokens": facts.shape.context,
        "tokenizer": tokenizer.digest,
        "serve": facts.serve.path,
        "memory": {"card_bytes": card.CARD_BYTES, "files": card.memory(facts)},
        "verify": list(facts.verify),
        "scores": list(facts.scores),
        "files": listing,
    }
