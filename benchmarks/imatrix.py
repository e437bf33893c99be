"""What an importance matrix is worth: KL of quantised models against F32, with it and without.

Two kinds of trained models: one of 2.9M parameters a seed, trained here on Russian stories by corpora.prepare
and adaptation.scratch, whose rows of 256 and 768 take every type; and stories260K, which others trained, whose
rows of 64 and 172 take no K-quant: llama.cpp gives them larger types. Texts and stories260K are those of
SAMOVAR_DATA. The matrix is export.imatrix's, from text of the training; KL(F32 || quantised) is the mean over
chunks of text held out before it, by llama.cpp, keys and values in float32. A flat matrix, ones alone, stands
beside: with any matrix llama.cpp rounds by another method, and some types it makes only with one. Each figure
is kept in a file of its own as soon as it stands: a run that was stopped goes on.

    nice -n 10 python benchmarks/imatrix.py --steps 500 2000 --seeds 17 18 19
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from seeds import DATA, ROOT, half_width, run_recipe

from export import gguf, ggufs, imatrix
from export.parity.divergence import divergence, log_softmax
from export.quants import importance, quantiser
from foundation import gguf_header
from foundation.dataio import documents, write_jsonl
from foundation.errors import ModelError
from foundation.files import read_json, write_json
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.shape import ModelShape

QUANTS = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XS")  # the last is not made without a matrix
CONTEXT, CALIBRATION_CHUNKS, HELD_CHUNKS = 128, 512, 64  # tokens; those of the training rows here

RECIPE = """
name = "imatrix"
seed = {seed}

[inputs]
stories = {stories}

[[stage]]
name = "text"
kind = "corpora.prepare"
reads = {{ corpus = "stories" }}
field = "story"
held_share = 0.03

[[stage]]
name = "model"
kind = "adaptation.scratch"
reads = {{ corpus = "text.text" }}
layers = 3
hidden = 256
ffn = 768
heads = 4
kv_heads = 2
vocab_tokens = 2000
context_tokens = 512
batch_rows = 8
steps = {steps}
learning_rate = 2e-3
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--steps", type=int, nargs="+", default=[500, 2000], help="of training")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "imatrix")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "imatrix.json")
    chosen = parser.parse_args()
    if not (DATA / "text" / "tinystories-ru").is_dir():
        print(f"skipped: {DATA / 'text' / 'tinystories-ru'} is not there; set SAMOVAR_DATA", file=sys.stderr)
        return 0
    found: dict[str, Any] = {}
    for name, model, calibration, held in subjects(chosen):
        found[name] = measured(model, calibration, held, chosen.out / f"cells-{name}")
        tell(name, found[name])
        result = {
            "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
            "settings": {
                "context_tokens": CONTEXT,
                "calibration_chunks": CALIBRATION_CHUNKS,
                "held_chunks": HELD_CHUNKS,
            },
            "models": found,
            "seeds": {
                f"{steps} steps": over_seeds([found[name] for name in found if name.startswith(f"{steps}-")])
                for steps in chosen.steps
                if f"{steps}-{chosen.seeds[0]}" in found
            },
        }
        write_json(chosen.result, result)
    return 0


def subjects(chosen: argparse.Namespace) -> Iterator[tuple[str, Path, Path, Path]]:
    """(name, model folder, calibration text, held-out text) of each model, made when it is asked for."""
    tales = chosen.out / "tales"
    tales.mkdir(parents=True, exist_ok=True)
    told = list(documents([DATA / "text" / "grimm-en" / "GrimmsFairyTales.txt"]))
    cut = len(told) * 2 // 3
    for name, part in (("text", told[:cut]), ("held", told[cut:])):
        write_jsonl(tales / f"{name}.jsonl", ({"text": text} for text in part))
    yield "stories260K", DATA / "models" / "stories260K", tales / "text.jsonl", tales / "held.jsonl"
    stories = json.dumps(str((DATA / "text" / "tinystories-ru").resolve() / "*.jsonl"))
    for steps, seed in product(chosen.steps, chosen.seeds):
        recipe = RECIPE.format(seed=seed, steps=steps, stories=stories)
        name = f"{steps}-{seed}"
        run = run_recipe(recipe, chosen.out / name)
        yield name, run / "model" / "model", run / "text" / "text.jsonl", run / "text" / "held.jsonl"


def measured(model: Path, calibration: Path, held: Path, out: Path) -> dict[str, Any]:
    """The cells of one model, each from its file in `out` where it stands already."""
    source = exported(model, out)
    matrix = importance.read(calibrated(model, calibration, out))
    flat = replace(matrix, means={name: np.ones_like(means) for name, means in matrix.means.items()})
    chunks = imatrix.read_chunks(model, ModelShape.from_folder(model).vocab, [held], CONTEXT, HELD_CHUNKS)
    reference = cache(lambda: list(logits_of(source, chunks)))  # [T, V] a chunk; only when a cell is missing
    own = cell(out / "f32.json", lambda: {"perplexity": perplexity(reference(), chunks)})
    cells: dict[str, Any] = {}
    for quant in QUANTS:
        for side, used in (("without", None), ("flat", flat), ("with", matrix)):
            make = partial(quantised, source, quant, used, chunks, reference, out)
            cells.setdefault(quant, {})[side] = cell(out / f"{quant}-{side}.json", make)
    return {**own, "quants": {quant: compared(**sides) for quant, sides in cells.items()}}


def cell(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What stands in `path`, or what `make` finds, kept there."""
    found = read_json(path)
    if found is None:
        found = make()
        write_json(path, found)
    return found


def exported(model: Path, out: Path) -> Path:
    """The F32 file of a model folder."""
    if not (out / "f32" / "gguf").is_dir():
        (out / "f32").mkdir(parents=True, exist_ok=True)
        gguf.run(gguf.Settings(), {"model": model}, out / "f32", Silent())
    return gguf_header.find(out / "f32" / "gguf")


def calibrated(model: Path, text: Path, out: Path) -> Path:
    """The importance matrix of a model folder."""
    path = out / "imatrix" / "imatrix.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = imatrix.Settings(context_tokens=CONTEXT, chunks=CALIBRATION_CHUNKS)
        imatrix.run(settings, {"model": model, "texts": text}, path.parent, Silent())
    return path


def quantised(
    source: Path,
    quant: str,
    used: importance.Importance | None,
    chunks: np.ndarray,
    reference: Callable[[], list[np.ndarray]],
    out: Path,
) -> dict[str, Any]:
    """KL of one file against F32, by chunk, and what the file is made of; or why llama.cpp refuses."""
    target = out / "quantised.gguf"
    try:
        quantiser.write(source, target, quantiser.Wish(quant, importance=used))
    except ModelError as error:
        return {"refused": error.message}
    table = ggufs.tensors(target)
    pairs = zip(reference(), logits_of(target, chunks), strict=True)
    kl = [float(divergence(wanted, got).mean()) for wanted, got in pairs]
    target.unlink()
    return {
        "kl_of_chunks": kl,
        "bits_per_weight": round(ggufs.bits_per_weight(table), 3),
        "types": dict(sorted(Counter(t.type for t in table if len(t.shape) > 1).items())),
    }


def logits_of(path: Path, chunks: np.ndarray) -> Iterator[np.ndarray]:
    """Logits of each chunk [T, V] by llama.cpp, keys and values in float32."""
    with LlamaModel(path) as model, model.context(CONTEXT, threads=1, cache="f32") as context:
        for chunk in chunks:
            yield context.logits(chunk.tolist())


def perplexity(logits: list[np.ndarray], chunks: np.ndarray) -> float:
    """Of the F32 file, so that it can be seen that the model has learnt something."""
    nats = [
        -log_softmax(row)[following]
        for rows, chunk in zip(logits, chunks, strict=True)
        for row, following in zip(rows, chunk[1:], strict=False)
    ]
    return float(np.exp(np.mean(nats)))


def compared(**sides: dict[str, Any]) -> dict[str, Any]:
    """KL of each side, and by how much the matrix makes it smaller than without one and than a flat one does.

    Intervals are those of the difference chunk by chunk, by Student's t.
    """
    said = {
        side: {key: value for key, value in found.items() if key != "kl_of_chunks"}
        | ({"kl": statistics.mean(found["kl_of_chunks"])} if "kl_of_chunks" in found else {})
        for side, found in sides.items()
    }
    for other in ("without", "flat"):
        if all("kl" in said[side] for side in (other, "with")):
            pairs = zip(sides[other]["kl_of_chunks"], sides["with"]["kl_of_chunks"], strict=True)
            gains = [a - b for a, b in pairs]
            said[f"against {other}"] = {
                "ratio": said["with"]["kl"] / said[other]["kl"],
                "lower_by": {"mean": statistics.mean(gains), "half_width": half_width(gains)},
                "chunks_lower": f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
            }
    return said


def over_seeds(models: list[dict[str, Any]]) -> dict[str, Any]:
    """KL of each side, and the ratios to the matrix's, by quantisation: the mean over seeds, and each."""
    found: dict[str, Any] = {}
    for quant in QUANTS:
        rows = [model["quants"][quant] for model in models]
        columns = {f"kl {side}": [row[side].get("kl") for row in rows] for side in ("without", "flat", "with")}
        for key in ("against without", "against flat"):
            columns[f"ratio {key}"] = [row.get(key, {}).get("ratio") for row in rows]
        found[quant] = {
            name: {"mean": statistics.mean(values), "seeds": values}
            | ({"half_width": half_width(values)} if len(values) > 1 else {})
            for name, values in columns.items()
            if None not in values
        }
    return found


def tell(name: str, found: dict[str, Any]) -> None:
    print(f"{name}, perplexity {found['perplexity']:.2f}")
    for quant, row in found["quants"].items():
        kl = [f"{row[side].get('kl', math.nan):.5f} {side}" for side in ("without", "flat", "with")]
        ratios = [
            f"{row[key]['ratio']:.3f} {key} ({row[key]['chunks_lower']})"
            for key in ("against without", "against flat")
            if key in row
        ]
        print(f"  {quant:8} KL {', '.join(kl)}; ratio {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
