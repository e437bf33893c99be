"""A real model that nobody here trained: stories260K learns Russian, and is exported.

It is a pretrained English TinyStories Llama of 260k parameters with 512 tokens; Russian costs it 13 tokens a
word. Its vocabulary is extended, it reads Russian stories for a few minutes, and bits per byte are measured on
stories held out from the start. Needs the folder named by SAMOVAR_DATA (default ../shared/data).

    python benchmarks/stories260k.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
name = "stories260k"
seed = 17
jobs = 2

[inputs]
model = {model}
stories = {stories}
tales = {tales}

[[stage]]
name = "russian"
kind = "corpora.prepare"
reads = {{ corpus = "stories" }}
field = "story"
held_share = 0.03

[[stage]]
name = "english"
kind = "corpora.prepare"
reads = {{ corpus = "tales" }}
held_share = 0.1

[[stage]]
name = "vocabulary"
kind = "adaptation.vocabulary"
reads = {{ model = "model", corpus = "russian.text" }}
pieces = 4000
add_tokens = 2000

[[stage]]
name = "embedded"
kind = "adaptation.embeddings"
reads = {{ model = "model", tokenizer = "vocabulary" }}

[[stage]]
name = "adapted"
kind = "adaptation.pretrain"
reads = {{ model = "embedded", corpus = ["russian.text", "english.text"] }}
trains = ["embeddings", "head", "layers"]
block_tokens = 256
batch_rows = 8
steps = {steps}
learning_rate = 2e-3

[[stage]]
name = "before"
kind = "evaluation.score"
reads = {{ model = "model", texts = ["russian.held", "english.held"] }}
label = "stories260K"
window_tokens = 512
max_documents = 200

[[stage]]
name = "after"
kind = "evaluation.score"
reads = {{ model = "adapted", texts = ["russian.held", "english.held"] }}
label = "adapted"
window_tokens = 512
max_documents = 200

[[stage]]
name = "gguf"
kind = "export.gguf"
reads = {{ model = "adapted" }}

[[stage]]
name = "verified"
kind = "export.verify"
reads = {{ model = "adapted", gguf = "gguf", texts = ["russian.held", "english.held"] }}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "stories260k")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "stories260k.json")
    options = parser.parse_args()
    data = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "models" / "stories260K").is_dir():
        print(f"skipped: {data / 'models' / 'stories260K'} is not there; set SAMOVAR_DATA", file=sys.stderr)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    recipe = options.out.with_suffix(".toml")
    recipe.write_text(
        RECIPE.format(
            model=json.dumps(str((data / "models" / "stories260K").resolve())),
            stories=json.dumps(str((data / "text" / "tinystories-ru").resolve() / "*.jsonl")),
            tales=json.dumps(str((data / "text" / "grimm-en" / "GrimmsFairyTales.txt").resolve())),
            steps=options.steps,
        ),
        encoding="utf-8",
    )
    samovar = [sys.executable, "-m", "samovar.cli"]
    code = subprocess.run([*samovar, "run", "--out", str(options.out), str(recipe)], cwd=ROOT).returncode
    if code:
        return code
    scores = {
        name: json.loads((options.out / name / "scores.json").read_text())["bits_per_byte"]
        for name in ("before", "after")
    }
    figures = json.loads((options.out / "vocabulary" / "manifest.json").read_text())["figures"]
    text = story(options.out / "gguf" / "model.gguf")
    result = {"bits_per_byte": scores, "vocabulary": figures, "steps": options.steps, "story": text}
    print(json.dumps(result, indent=1, ensure_ascii=False))
    options.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def story(gguf: Path) -> str:
    """What the exported model tells after the usual first words."""
    from foundation.llama import LlamaModel

    start = "Однажды"
    with LlamaModel(gguf) as model, model.context(model.trained_context) as context:
        return start + "".join(context.generate_stream(model.tokenize(start, add_special=True), 120))


if __name__ == "__main__":
    sys.exit(main())
