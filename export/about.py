"""Who made a model, of what, and under which licence: the general.* keys of its GGUF file.

A GGUF file travels alone, so it must say this itself; the bundle and its card read it from there. What a
recipe leaves open is taken from the head of the folder's README.md, as on the Hugging Face Hub. Keys and
their spelling are those of llama.cpp's converter, so that its tools and the Hub show them.

Untrusted input: the README of a downloaded model. Its head is parsed as plain YAML, and only texts are taken.
Source: gguf-py's metadata.py; https://huggingface.co/docs/hub/model-cards (names in the head).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from foundation.errors import ModelError
from foundation.files import read_json

HUB = "https://huggingface.co/"
_HUB_ID = re.compile(re.escape(HUB) + r"([^/\s]+/[^/\s]+)$")
_URL = re.compile(r"(https?|ssh)://")
_HEAD_LIMIT = 65_536  # characters; a hostile one could be long
_TEXT_LIMIT = 2_000
_README = {  # field -> its names in a README's head
    "license": ("license",),
    "license_name": ("license_name",),
    "license_link": ("license_link",),
    "base_models": ("base_model",),
    "datasets": ("datasets",),
    "languages": ("language",),
    "tags": ("tags", "pipeline_tag"),
    "description": ("description",),
}
_LARGEST = 2**31  # of a number in generation_config.json that is taken: what int32 and float32 hold
_SAMPLING = {  # key of generation_config.json -> general.sampling.*, and whether it is a whole number
    "top_k": ("top_k", True),
    "top_p": ("top_p", False),
    "min_p": ("min_p", False),
    "temperature": ("temp", False),
    "repetition_penalty": ("penalty_repeat", False),
}


@dataclass(frozen=True)
class About:
    """Empty means unknown."""

    name: str = "model"
    license: str = ""  # SPDX id, or "other"
    license_name: str = ""  # where the licence is "other"
    license_link: str = ""
    base_models: tuple[str, ...] = ()  # ids on the Hub, or URLs
    datasets: tuple[str, ...] = ()  # likewise
    languages: tuple[str, ...] = ()  # ISO 639-1 codes
    tags: tuple[str, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        """Raises ModelError for what could break a line or a page that shows it."""
        for field in fields(self):
            value = getattr(self, field.name)
            for text in (value,) if isinstance(value, str) else value:
                if not isinstance(text, str) or len(text) > _TEXT_LIMIT or not text.isprintable():
                    shown = repr(text)[:80]
                    raise ModelError(
                        f"{field.name} {shown}: a line of up to {_TEXT_LIMIT} characters is needed"
                    )


def of_folder(folder: Path, given: About) -> About:
    """`given`, its empty fields filled from the head of `folder`/README.md where there is one.

    Raises ModelError: a head that is not YAML, or says something that is no text.
    """
    path = folder / "README.md"
    head = _head(path)
    found: dict[str, Any] = {}
    for field in fields(About):
        value = getattr(given, field.name)
        if not value:
            told = [text for key in _README.get(field.name, ()) for text in _texts(head.get(key), key, path)]
            value = tuple(dict.fromkeys(told)) if isinstance(value, tuple) else ",".join(told)
        found[field.name] = value
    return About(**found)


def write(about: About, writer: Any, parameters: int) -> None:
    """Write the general.* keys to a GGUFWriter. parameters: number of weights in the file."""
    import gguf

    writer.add_name(about.name)
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(about.name, parameters)
    writer.add_basename(basename)
    writer.add_finetune(finetune)
    writer.add_version(version)
    writer.add_size_label(size or gguf.size_label(parameters, parameters, 0, 0))
    writer.add_description(about.description)
    writer.add_license(about.license)
    writer.add_license_name(about.license_name)
    writer.add_license_link(about.license_link)
    for kind, sources in (("base_model", about.base_models), ("dataset", about.datasets)):
        if sources:
            getattr(writer, f"add_{kind}_count")(len(sources))
        for number, source in enumerate(sources):
            for key, value in _components(source, parameters).items():
                getattr(writer, f"add_{kind}_{key}")(number, value)
    writer.add_tags(about.tags)
    writer.add_languages(about.languages)


def write_sampling(folder: Path, writer: Any) -> None:
    """How its makers sample from the model, by `folder`/generation_config.json, as general.sampling.*."""
    config = read_json(folder / "generation_config.json")
    for key, (name, whole) in _SAMPLING.items():
        value = config.get(key) if isinstance(config, dict) else None
        kinds = int if whole else int | float
        if isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < _LARGEST:
            getattr(writer, f"add_sampling_{name}")(value if whole else float(value))


def of_gguf(path: Path) -> About:
    """What a GGUF file says of itself. Raises ModelError when it can not be read."""
    from foundation.gguf_header import read

    keys, _ = read(path)

    def text(key: str) -> str:
        return str(keys.get(f"general.{key}") or "")

    def sources(kind: str) -> tuple[str, ...]:
        count = keys.get(f"general.{kind}.count") or 0
        rows = [(text(f"{kind}.{i}.repo_url"), text(f"{kind}.{i}.name")) for i in range(min(count, 1000))]
        return tuple(_HUB_ID.sub(r"\1", url) or name for url, name in rows if url or name)

    return About(
        name=text("name"),
        license=text("license"),
        license_name=text("license.name"),
        license_link=text("license.link"),
        base_models=sources("base_model"),
        datasets=sources("dataset"),
        languages=tuple(keys.get("general.languages") or ()),
        tags=tuple(keys.get("general.tags") or ()),
        description=text("description"),
    )


def _components(source: str, parameters: int) -> dict[str, str]:
    """What is written of a base model or a dataset, by its id or URL."""
    import gguf

    found = {"repo_url": source} if _URL.match(source) else {}
    match = _HUB_ID.match(source)
    if found and not match:
        return found
    known = match[1] if match else source
    full, organisation, _, _, version, _ = gguf.Metadata.get_model_id_components(known, parameters)
    if full:
        found["name"] = gguf.Metadata.id_to_title(full)
    if organisation:
        found["organization"] = gguf.Metadata.id_to_title(organisation)
        found.setdefault("repo_url", f"{HUB}{organisation}/{full}")
    return found | ({"version": version} if version else {})


def _head(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of three dashes; empty without a README or a head."""
    import yaml

    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace")[:_HEAD_LIMIT].splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)]).replace("\t", "  ")
    try:
        head = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path}: its head is not YAML: {reason}", hint="mend what stands between the two lines ---"
        ) from error
    return head if isinstance(head, dict) else {}


def _texts(value: Any, key: str, path: Path) -> list[str]:
    """A text, or a list of them, as a list. YAML reads the language code `no` as false."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = ["no" if item is False else item for item in values]
    for text in texts:
        if not isinstance(text, str):
            raise ModelError(
                f"{path}: {key} says {str(text)[:80]!r}, a text or a list of texts is needed",
                hint="put it in quotes",
            )
    return texts
