"""`samovar export MODEL --quant Q4_K_M,Q8_0`: from a model to the folder that ships, without a recipe.

There is no second machinery: a recipe is composed, kept as RUN/recipe.toml, and run like any other. So it
resumes, reuses what an earlier export of the same model made, and can be gone on from by hand:

    gguf (F32) -> imatrix (where asked for or needed) -> quantized -> verified -> bundle

F32, F16, BF16 and Q8_0 are written directly, when nothing else is asked for.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import InputError, RunError

if TYPE_CHECKING:
    from samovar.run import Outcome

DIRECT = ("F32", "F16", "BF16", "Q8_0")  # export.gguf writes them itself
HELD_SHARE = 0.2  # of the text, for verification, when the rest makes the importance matrix
HELD_SEED = 6021  # of no recipe: text that one held back would by the same seed be held back whole
MARK = "# end of what `samovar export` wrote: "
_LICENCE = re.compile(r"[\w.+-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")


def main(
    model: str,
    quants: str,
    *,
    out: Path | None = None,
    name: str | None = None,
    texts: Sequence[str] = (),
    imatrix: bool = False,
    license: str = "",
    dry: bool = False,
    as_json: bool = False,
) -> int:
    """Export, and tell what was made; the exit code. Refuses, before anything is written, what can not be."""
    from foundation.rundir import RunDirectory, acquire
    from samovar.cli import _print, _say, _screen, _show
    from samovar.recipe import load
    from samovar.run import make_planner, run
    from samovar.show import plan_json, plan_table

    types = wanted_types(quants, imatrix=imatrix, texts=bool(texts))
    source = model_at(model)
    title = checked_name(name) if name else name_of(source)
    text = compose(source, types, title, [text_at(value) for value in texts], imatrix, license)
    folder = out or Path("runs") / f"export-{slug(title)}"
    directory = RunDirectory(folder)
    refuse_foreign(directory)
    if dry:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "recipe.toml"
            path.write_text(text, encoding="utf-8")
            steps = make_planner(load(path), folder.absolute(), download=False).plan()
        if as_json:
            _print({"run": str(folder), "recipe": text, "stages": plan_json(steps)})
        else:
            _say(text)
            _show(plan_table(steps))
        return 0
    directory.create()
    acquire(directory.lock).release()  # a run that is going on keeps its recipe
    directory.describe(text)
    outcome = run(load(directory.recipe), folder, screen=_screen(as_json))
    bundle = folder / "bundle" / "bundle"
    if as_json:
        told = {"run": str(folder), "state": outcome.state, "message": outcome.message, "hint": outcome.hint}
        files = {} if outcome.exit_code else {"bundle": str(bundle), **_made(bundle)}
        _print(told | {"stages": plan_json(outcome.steps)} | files)
    else:
        _tell(outcome, folder, bundle)
    return outcome.exit_code


def wanted_types(quants: str, *, imatrix: bool, texts: bool) -> list[str]:
    """File types by name, each once. Raises InputError naming every fault at once."""
    from export.quants.types import QUANTS, check_quant

    names = list(dict.fromkeys(name.strip().upper() for name in quants.split(",") if name.strip()))
    problems = [] if names else ["--quant names no type"]
    for name in names:
        try:
            check_quant(name)
        except ValueError as error:
            problems.append(f"--quant: {str(error).partition('; known')[0]}")
    if problems:
        raise InputError("\n".join(problems), hint=f"there are {', '.join(QUANTS)}")
    needing = [name for name in names if QUANTS[name].needs_imatrix]
    if (imatrix or needing) and not texts:
        what = f"{', '.join(needing)} needs" if needing else "--imatrix makes"
        raise InputError(
            f"{what} an importance matrix, which is computed from text, and no --text was given",
            hint="add --text FILE: a megabyte in the languages and of the kind that the model is for",
        )
    if imatrix and all(name in DIRECT for name in names):
        raise InputError(
            f"--imatrix changes nothing of {', '.join(names)}",
            hint="leave it out, or add a type such as Q4_K_M",
        )
    return names


def model_at(value: str) -> str:
    """MODEL as an input of a recipe: a folder with a config.json, or an id of the hub.

    The folder of a stage stands for the model in it. Raises InputError, saying what was found instead.
    """
    from samovar.inputs import _is_of_hub

    path = Path(value).expanduser()
    path = path.resolve() if ".." in path.parts else path
    if path.is_file():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise InputError(
            f"{value} is {kind}", hint="give the model's folder, with config.json and *.safetensors"
        )
    if path.is_dir():
        if (path / "config.json").is_file():
            return _printable(path.absolute())
        inside = sorted(config.parent for config in path.glob("[!.]*/config.json"))
        if len(inside) == 1:
            return _printable(inside[0].absolute())
        hint = f"give one of {', '.join(map(str, inside[:5]))}" if inside else "give the folder of a model"
        raise InputError(
            f"{value} holds {len(inside) or 'no'} models: a folder with config.json is needed", hint=hint
        )
    if _is_of_hub(value, Path.cwd()):
        return value
    raise InputError(
        f"there is no folder {value}", hint="give a model's folder, a stage's as runs/NAME/STAGE, or a hub id"
    )


def text_at(value: str) -> str:
    """A --text as an input of a recipe. Raises InputError when there is no such file."""
    from samovar.inputs import _is_of_hub

    path = Path(value).expanduser()
    if path.exists() or (glob.has_magic(value) and glob.glob(str(path), recursive=True)):  # noqa: PTH207
        return _printable(path.absolute())
    if value.startswith("datasets/") and _is_of_hub(value, Path.cwd()):
        return value
    raise InputError(
        f"--text: there is no {value}", hint="give files of text, a folder, or datasets/OWNER/NAME"
    )


def name_of(source: str) -> str:
    """What to call a model that nobody named: the hub's name, or the folder's; of STAGE/model the stage's."""
    path = Path(source.partition("@")[0])
    last = path.parent.name if path.name == "model" and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:80] or "model"


def checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"--name {name!r}: letters, digits, '.', '_' and '-' are allowed, the first a letter or digit",
            hint="81 characters at most, such as my-model-1.5",
        )
    return name


def slug(name: str) -> str:
    """A name as recipes and folders have it."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")[:50] or "model"


def compose(
    source: str, types: Sequence[str], name: str, texts: Sequence[str], imatrix: bool, license: str
) -> str:
    """The recipe, as TOML that a person reads and goes on from."""
    from export.quants.types import QUANTS

    if license and not _LICENCE.fullmatch(license):
        raise InputError(
            f"--license {license!r} is no SPDX id", hint="for example Apache-2.0, MIT, LicenseRef-Mine"
        )
    imatrix = imatrix or any(QUANTS[kind].needs_imatrix for kind in types)
    inputs = {
        "model": source,
        **{f"text{n}": value for n, value in enumerate(texts, 1)},
        "recipe": "recipe.toml",
    }
    about: dict[str, Any] = {"model_name": name}
    about |= {"license": license} if license else {}
    about |= {"base_models": [source.partition("@")[0]]} if not Path(source).is_absolute() else {}
    stages: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []  # name, kind, reads, settings
    if texts:
        corpus = {"corpus": [f"text{n}" for n in range(1, len(texts) + 1)]}
        split = {"held_share": HELD_SHARE, "seed": HELD_SEED} if imatrix else {"held_share": 0.0}
        stages.append(("texts", "corpora.prepare", corpus, split))
    if all(kind in DIRECT for kind in types):
        shipped = [kind.lower() for kind in types]
        files = shipped
        for kind in shipped:
            stages.append((kind, "export.gguf", {"model": "model"}, {"dtype": kind, **about}))
    else:
        made = [kind for kind in types if kind != "F32"]
        stages.append(("gguf", "export.gguf", {"model": "model"}, about))
        if imatrix:
            stages.append(("imatrix", "export.imatrix", {"model": "model", "texts": "texts"}, {}))
        source_files = {"gguf": "gguf", **({"imatrix": "imatrix"} if imatrix else {})}
        stages.append(("quantized", "export.quantize", source_files, {"types": made}))
        shipped, files = ["gguf"] * ("F32" in types) + ["quantized"], ["gguf", "quantized"]
    against = {"texts": "texts.held" if imatrix else "texts"} if texts else {}
    stages.append(("verified", "export.verify", {"model": "model", "gguf": files, **against}, {}))
    reads = {"model": "model", "gguf": shipped, "verify": "verified", "recipe": "recipe"}
    stages.append(("bundle", "export.bundle", reads, {}))
    return _toml(name, inputs, stages)


def refuse_foreign(directory: Any) -> None:
    """Raise RunError where a recipe stands that `samovar export` did not write, or that was edited since."""
    if not directory.exists():
        return
    text = directory.recipe.read_text(encoding="utf-8", errors="replace") if directory.recipe.is_file() else ""
    body, _, mark = text.rpartition(MARK)
    if not body:
        raise RunError(f"{directory.path} is the run of another recipe", hint="name another folder with --out")
    if mark.strip() != _mark(body):
        run = f"samovar run {directory.recipe} --out {directory.path}"
        raise RunError(
            f"{directory.recipe} was edited since it was written",
            hint=f"{run} goes on with it; or name another --out",
        )


def _toml(name: str, inputs: dict[str, str], stages: Sequence[tuple[str, str, dict, dict]]) -> str:
    lines = [
        "# Written by `samovar export`. To go on from it, edit it, and give it to `samovar run` with this",
        "# run's folder as --out: what the change does not touch is not made again.",
        "",
        f'name = "export-{slug(name)}"',
        f"description = {_value(f'export of {name}')}",
        "",
        "[inputs]",
        *(f"{key} = {_value(value)}" for key, value in inputs.items()),
    ]
    for stage, kind, reads, settings in stages:
        table = ", ".join(f"{role} = {_value(value)}" for role, value in reads.items())
        lines += ["", "[[stage]]", f'name = "{stage}"', f'kind = "{kind}"', f"reads = {{ {table} }}"]
        lines += [f"{key} = {_value(value)}" for key, value in settings.items()]
    body = "\n".join([*lines, "", ""])
    return f"{body}{MARK}{_mark(body)}\n"


def _value(value: Any) -> str:
    """A text, number or list as TOML writes it, which is as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def _mark(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _printable(path: Path) -> str:
    if not str(path).isprintable():
        raise InputError(f"{str(path)!r} has characters that a recipe can not hold", hint="rename that folder")
    return str(path)


def _made(bundle: Path) -> dict[str, Any]:
    """What a bundle's list says of its files."""
    from foundation.files import read_json

    index = read_json(bundle / "bundle.json")
    return {key: index[key] for key in ("serve", "serve_because", "gguf", "commands")}


def _tell(outcome: Outcome, folder: Path, bundle: Path) -> None:
    """The files with what verification measured, and what to do with them; or what went wrong."""
    import shlex

    import typer

    from foundation.files import read_json
    from samovar.cli import _say, _show
    from samovar.show import rows, size

    if outcome.exit_code:
        typer.echo(f"samovar: {outcome.message}" + (f"\n  -> {outcome.hint}" if outcome.hint else ""), err=True)
        if outcome.exit_code == 1:  # what a hint names as a setting is set there
            recipe = f"{folder}/recipe.toml"
            typer.echo(f"  -> settings stand in {recipe}: samovar run {recipe} --out {folder}", err=True)
        return
    made = _made(bundle)
    report = read_json(folder / "verified" / "verify.json")
    kl = {row["quantisation"]: row for row in report["files"]}
    lines = []
    for file in made["gguf"]:
        row = kl[file["type"]]
        held = row.get("holdout") or {}
        lines.append((
            file["type"], size(file["size_bytes"]), f"{file['bits_per_weight']:.2f}",
            f"{row['logits']['kl_mean']:.2g}", f"{100 * row['logits']['top1']:.1f} %",
            f"{held['perplexity']:.4g}" if held else "", f"{held['kl_mean']:.2g}" if held else "",
        ))  # fmt: skip
    columns = ("type", "size", "bits a weight", "KL", "same best token", "perplexity", "KL on text")
    _show(rows(columns[: 7 if any(line[5] for line in lines) else 5], lines))
    if not report.get("original"):
        _say("perplexity was not measured: it needs text of yours, --text FILE")
    _say(f"serve {made['serve']}: {made['serve_because']}")
    _say(f"finished: {bundle}\n  samovar chat {shlex.quote(str(bundle))}")
