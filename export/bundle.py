"""Stage export.bundle: the folder that ships. Whoever gets it needs nothing else.

    bundle/
      bundle.json           name, file to serve, command lines, every file's size and sha256
      gguf/NAME-QUANT.gguf  for llama.cpp and what is built on it; a sharded file keeps its shards
      adapters/NAME.gguf    LoRA adapters of that model, if any
      hf/                   the checkpoint: for other engines, and for training on
      chat_template.jinja   generation.json   README.md   Modelfile   Modelfile.ADAPTER   LICENSES/

Name, licence, base models, datasets and languages are those that the GGUF files say of themselves, so they
can not differ from them. No times and no paths of this machine: the same inputs give the same bytes.
`samovar bundle verify` checks what arrived.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from export import ggufs
from export.about import About, of_gguf
from export.shipping import card, commands, recipes
from export.shipping.card import Adapter, Facts, Quantised
from export.shipping.modelfile import Served, modelfile
from export.shipping.turns import describe
from foundation import gguf_header
from foundation.chat import Chat
from foundation.errors import InputError, ModelError
from foundation.files import check_space, read_json, sha256_file, visible_files, write_json
from foundation.llama import LlamaModel
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer

FORMAT = 2  # 1: one file a model, licence and languages as settings
INDEX = "bundle.json"
CHECKPOINT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "special_tokens_map.json",
    "*.jinja",
)  # fmt: skip
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
SMALL_PARAMETERS = 1_500_000_000  # below it four bits cost quality and save little: Q8_0 is served
SPARE_BYTES = 64 << 20  # for the small files, and so that the disk is not left full
_CHUNK_BYTES = 8 << 20
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers', when it samples
_WHOLE = ("top_k", "max_new_tokens")


class Settings(StageSettings):
    """What the bundle says of the model is what the GGUF files say of themselves: it is not set here."""

    short: bool = Field(
        False, description="the recipe's [short] values were in force; to be set in the recipe's own [short]"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read roles `model`, `gguf` (many), `verify`, `scores`, `adapters` (many), `recipe`; write `out`/bundle.

    Raises ModelError or InputError: no checkpoint, files of different models, two of one type, an adapter of
    another model; RunError when the disk has no room.
    """
    folder, bundle = one(inputs, "model"), out / ".work" / "bundle"
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no *.safetensors", hint="a bundle ships the checkpoint; give its folder")
    sources = [first for path in many(inputs, "gguf") for first in _ggufs(path)]
    adapters = [first for path in many(inputs, "adapters") for first in _ggufs(path)]
    if not sources:
        raise InputError("no GGUF file was given", hint="read the gguf of export.gguf or of export.quantize")
    shipped = [*_parts(sources), *_parts(adapters), *_matching(folder)]
    about, shape, tokenizer = _about(sources), ModelShape.from_folder(folder), Tokenizer(folder)
    _refuse_others(adapters, sources[0])
    stops, bos = _ends(sources[0], shape)
    generation = _generation(folder, shape, stops)
    verify = [_json(path, "verify.json") for path in many(inputs, "verify")]
    scores = [_json(path, "scores.json") for path in many(inputs, "scores")]
    recipe = next((recipes.summary(path, short=settings.short) for path in many(inputs, "recipe")), None)
    if bundle.exists():
        shutil.rmtree(bundle)  # an unfinished one
    bundle.mkdir(parents=True)
    copying, name = _Copying(bundle, report, shipped), safe_name(about.name)
    files = [_copy_gguf(path, name, copying) for path in sources]
    files.sort(key=lambda file: (-file.size_bytes, file.type))  # not by how they were given
    loras = [_copy_adapter(path, copying) for path in adapters]
    for path in _matching(folder):
        copying.copy(path, f"{'LICENSES' if _is_licence(path) else 'hf'}/{path.name}")
    served, why = card.choose(files, verify, small=shape.parameters() < SMALL_PARAMETERS)
    facts = Facts(
        about=about,
        shape=shape,
        files=files,
        adapters=loras,
        serve=served,
        why=why,
        verify=verify,
        scores=scores,
        recipe=recipe,
        commands=commands.commands(name, served.path, shape.context, generation, [lora.path for lora in loras]),
        licences=[path.name for path in _matching(folder) if _is_licence(path)],
        template=tokenizer.chat_template is not None,
    )
    _write_texts(bundle, facts, tokenizer, generation, bos)
    listing = _listing(bundle, copying.digests)
    write_json(bundle / INDEX, _index(facts, tokenizer, listing))
    shutil.rmtree(out / "bundle", ignore_errors=True)  # of a stage that was killed before it was recorded
    bundle.rename(out / "bundle")
    report.note(f"{served.path} is the file to serve: {why}")
    if not about.license:
        report.note("the files name no licence: say it by `license` of export.gguf, or --license")
    size = sum(entry["size_bytes"] for entry in listing)
    return {"files": len(listing), "size_bytes": size, "serve": served.path}


def safe_name(name: str) -> str:
    """`name` as a part of file names."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:80] or "model"


def adapter_faults(adapter: Path, base: Path) -> list[str]:
    """Why `adapter` does not belong to the model `base`: another architecture, tensors or shapes it has not."""
    try:
        gguf_header.check_adapter(adapter, base)
    except ModelError as error:
        return [error.message]
    told, model = gguf_header.read(adapter)[0], gguf_header.read(base)[0]
    kind, wanted = told["general.architecture"], model.get("general.architecture")
    if kind != wanted:
        return [f"it is for the architecture {kind}, the model's is {wanted}"]
    matrices = {tensor.name: tensor.shape for tensor in ggufs.tensors(base)}  # [out, in]
    out = []
    for tensor in ggufs.tensors(adapter):
        name, _, part = tensor.name.rpartition(".lora_")
        if name not in matrices:
            out.append(f"the model has no {name or tensor.name}")
            continue
        rows, columns = matrices[name]
        embedding = (
            name == "token_embd.weight"
        )  # rows are looked up in it, so A and B stand the other way round
        has = tensor.shape[0] if embedding or part == "b" else tensor.shape[-1]
        wanted = rows if embedding == (part == "a") else columns
        if has != wanted:
            out.append(f"{tensor.name} is {tensor.shape}, for a matrix of {rows} x {columns}")
    return out[:5]


def _refuse_others(adapters: Iterable[Path], base: Path) -> None:
    for path in adapters:
        if faults := adapter_faults(path, base):
            hint = "export the adapter with the model that it was trained on, by export.adapter"
            raise ModelError(f"{path.name} is no adapter of this model: {'; '.join(faults)}", hint=hint)


def _about(sources: Iterable[Path]) -> About:
    """What all the files say of themselves. Raises InputError when they are of different models."""
    told = {path: of_gguf(path) for path in sources}
    first, about = next(iter(told.items()))
    for path, other in told.items():
        if other != about:
            raise InputError(
                f"{first} and {path} tell different things of themselves: {about} and {other}",
                hint="give files that were made from one export.gguf",
            )
    return about


def _ends(path: Path, shape: ModelShape) -> tuple[list[str], str]:
    """What ends an answer, and what llama.cpp puts before every text because the file tells it to, or nothing.

    Raises ModelError when the file is of another vocabulary than the model.
    """
    with LlamaModel(path, vocab_only=True) as model:
        if model.vocab_size != shape.vocab:
            raise ModelError(f"{path.name} has {model.vocab_size} tokens, the model {shape.vocab}")
        stops = [model.piece(i).decode("utf-8", "replace") for i in sorted(model.eog)]
        first = model.bos if model.adds_bos else None
        return stops, "" if first is None else model.piece(first).decode("utf-8", "replace")


def _ggufs(path: Path) -> list[Path]:
    """The models at `path`, a file or a folder of files, each by its first file."""
    if path.is_dir():
        return gguf_header.files(path)
    first = gguf_header.SHARD.sub(lambda part: f"-00001-of-{part[2]}.gguf", path.name)
    return [path.with_name(first)]


def _parts(firsts: Iterable[Path]) -> list[Path]:
    return [part for first in firsts for part in gguf_header.shards(first)]


def _matching(folder: Path) -> list[Path]:
    """The files of the checkpoint that ship."""
    patterns = (*CHECKPOINT_FILES, *LICENCE_FILES)
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _is_licence(path: Path) -> bool:
    return any(path.match(pattern) for pattern in LICENCE_FILES)


class _Copying:
    """Copies files into the bundle and keeps their digests: each byte is read once."""

    def __init__(self, bundle: Path, report: Report, files: Iterable[Path]) -> None:
        self.digests: dict[str, str] = {}
        self._bundle, self._report = bundle, report
        self._done, self._total = 0, sum(path.stat().st_size for path in files)
        hint = "free some space on that disk; the same command then goes on"
        check_space(bundle, self._total + SPARE_BYTES, hint)

    def copy(self, source: Path, name: str) -> Path:
        """Copy `source` to `name` inside the bundle."""
        target, digest = self._bundle / name, hashlib.sha256()
        target.parent.mkdir(exist_ok=True)
        with source.open("rb") as reader, target.open("xb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                writer.write(chunk)
                digest.update(chunk)
                self._done += len(chunk)
                self._report.progress(self._done, self._total, "byte")
                stop_if_asked(self._report)
        self.digests[name] = digest.hexdigest()
        return target


def _copy_gguf(first: Path, name: str, copying: _Copying) -> Quantised:
    table, kind = ggufs.tensors(first), ggufs.quantisation(first)
    parts = []
    for part in gguf_header.shards(first):
        number = gguf_header.SHARD.search(part.name)
        parts.append(f"gguf/{name}-{kind}{number[0] if number else '.gguf'}")
        if parts[-1] in copying.digests:
            raise InputError(f"two GGUF files of type {kind} were given", hint="a bundle has one of each type")
        copying.copy(part, parts[-1])
    return Quantised(
        path=parts[0],
        parts=tuple(parts),
        source=first.name,
        type=kind,
        size_bytes=sum(part.stat().st_size for part in gguf_header.shards(first)),
        bits_per_weight=ggufs.bits_per_weight(table),
        gpu_bytes=ggufs.gpu_bytes(table),
    )


def _copy_adapter(path: Path, copying: _Copying) -> Adapter:
    """An adapter under its own name: general.name, or the file's where it has none."""
    keys, _ = gguf_header.read(path)
    told = keys.get("general.name")
    name = safe_name(told if isinstance(told, str) and told else path.stem)
    target = f"adapters/{name}.gguf"
    if target in copying.digests:
        raise InputError(f"two adapters are called {name}", hint="set another adapter_name of export.adapter")
    copying.copy(path, target)
    ranks = [min(tensor.shape) for tensor in ggufs.tensors(path)]
    return Adapter(target, name, max(ranks, default=0), path.stat().st_size)


def _json(path: Path, name: str) -> dict[str, Any]:
    """A report: the file `path`, or `name` in the folder `path`."""
    file = path / name if path.is_dir() else path
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no JSON table")
    return value


def _generation(folder: Path, shape: ModelShape, stops: list[str]) -> dict[str, Any]:
    """How to sample, as the model's makers set it; greedy when they say nothing.

    Raises ModelError for a value that is no number.
    """
    given = read_json(folder / "generation_config.json")
    given = given if isinstance(given, dict) else {}
    sampling: dict[str, Any] = dict(_DEFAULTS) if given.get("do_sample") else {}
    for key in (*_DEFAULTS, "repetition_penalty", "max_new_tokens"):
        value = given.get(key)
        if value is None:
            continue
        whole = key in _WHOLE
        if (
            type(value) is bool
            or not isinstance(value, int if whole else int | float)
            or not math.isfinite(value)
        ):
            kind = "whole number" if whole else "number"
            raise ModelError(f"{folder}/generation_config.json: {key} is {value!r}, a {kind} is needed")
        sampling[key] = value
    if not given.get("do_sample"):
        sampling["temperature"] = 0.0
    return {"context_tokens": shape.context, "stop": stops, **sampling}


def _write_texts(
    bundle: Path, facts: Facts, tokenizer: Tokenizer, generation: Mapping[str, Any], bos: str
) -> None:
    """The small files: template, sampling, card, Modelfiles, the note on licences."""
    write_json(bundle / "generation.json", generation)
    (bundle / "README.md").write_text(card.readme(facts), encoding="utf-8")
    (bundle / "LICENSES").mkdir(exist_ok=True)
    (bundle / "LICENSES" / "README.txt").write_text(card.licences(facts), encoding="utf-8")
    turns = None
    if tokenizer.chat_template is not None:
        (bundle / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        turns = describe(Chat(tokenizer).render)
    for suffix, adapter in [("", ""), *((f".{lora.name}", lora.path) for lora in facts.adapters)]:
        served = Served(
            path=facts.serve.path,
            context_tokens=commands.context_served(facts.shape.context),
            generation=generation,
            license=facts.about.license,
            split=len(facts.serve.parts) > 1,
            adapter=adapter,
        )
        text = modelfile(served, turns, facts.template, bos)
        (bundle / f"Modelfile{suffix}").write_text(text, encoding="utf-8")


def _listing(bundle: Path, known: Mapping[str, str]) -> list[dict[str, Any]]:
    """Path, size and digest of every file."""
    return [
        {
            "path": name,
            "size_bytes": (bundle / name).stat().st_size,
            "sha256": known.get(name) or sha256_file(bundle / name),
        }
        for name in visible_files(bundle)
    ]


def _index(facts: Facts, tokenizer: Tokenizer, listing: list[dict[str, Any]]) -> dict[str, Any]:
    about = facts.about
    return {
        "format": FORMAT,
        "name": about.name,
        "license": about.license,
        "languages": list(about.languages),
        "base_models": list(about.base_models),
        "datasets": list(about.datasets),
        "architecture": facts.shape.model_type,
        "parameters": facts.shape.parameters(),
        "context_tokens": facts.shape.context,
        "tokenizer": tokenizer.digest,
        "serve": facts.serve.path,
        "serve_because": facts.why,
        "gguf": [
            {
                "path": file.path,
                "parts": list(file.parts),
                "type": file.type,
                "size_bytes": file.size_bytes,
                "bits_per_weight": round(file.bits_per_weight, 3),
            }
            for file in facts.files
        ],
        "adapters": [{"path": lora.path, "name": lora.name, "rank": lora.rank} for lora in facts.adapters],
        "commands": facts.commands,
        "memory": {
            "card_bytes": card.CARD_BYTES,
            "files": card.memory(facts),
            "contexts": card.memory_by_context(facts),
        },
        "recipe": facts.recipe,
        "verify": list(facts.verify),
        "scores": list(facts.scores),
        "files": listing,
    }
