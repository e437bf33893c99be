"""Every kind of model that this project makes, in llama.cpp and in transformers: the same logits and ids.

Random models of each architecture, plain, pruned, extended and propagated (tests/variants.py), with tokenizers
trained here and with real ones: Qwen2.5's and Mistral v3's. Each is exported in F32 and compared on 1,000
positions past its sliding window, on 10,000 lines of Russian and English, on Unicode fuzz and on every added
token in context. `texts_known` differ as they must: llama.cpp composes no letters (see
export/parity/tokenisation.py). `ties` are positions where two logits of the original are nearer than .01:
Gemma's GELU is a table of float16 numbers in ggml. Finished rows are kept: the script goes on where it was
stopped.

    nice python benchmarks/export_parity.py

Needs SAMOVAR_DATA (default ../shared/data); without it the flight-crew world's text and the trained tokenizers.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from handmade import CHAT_TEMPLATE, export  # noqa: E402
from spm import convert  # noqa: E402
from variants import ARCHITECTURES, VARIANTS, Variants, lines, parity  # noqa: E402

from foundation.files import read_json, write_json  # noqa: E402
from foundation.rundir import machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "export_parity.json"
BARS = {"kl_mean": 1e-6, "top1_or_tie": 1.0, "texts_different": 0, "ids_different": 0}
REAL = {"qwen2": "Qwen2.5", "qwen3": "Qwen2.5", "mistral": "Mistral v3"}  # architecture -> whose tokenizer
LEARNT = 3000  # lines of each language that tokenizers are trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000, help="texts compared, half of them Russian")
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--result", type=Path, default=RESULT)
    chosen = parser.parse_args()
    named = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))
    data = named if named.is_dir() else None
    russian, english = lines(chosen.lines // 2, data)
    compared = [line for pair in zip(russian, english, strict=True) for line in pair]
    found = read_json(chosen.result) or {"rows": {}}
    found |= {"machine": machine(), "lines": len(compared), "text": "real" if data else "world", "bars": BARS}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        learnt = (russian[:LEARNT], english[:LEARNT])
        makers = {"trained": Variants(work / "trained", *learnt)}
        if data:
            makers["real"] = Variants(work / "real", *learnt, tokenizers=real(data, work / "tokenizers"))
        for kind, maker in makers.items():
            for architecture in ARCHITECTURES if kind == "trained" else REAL:
                for variant in VARIANTS:
                    tokenizer = "trained" if kind == "trained" else REAL[architecture]
                    row = f"{architecture}, {variant}, {tokenizer} tokenizer"
                    if row not in found["rows"]:
                        folder = maker.folder(architecture, variant)
                        gguf = export(folder, work / "out")
                        found["rows"][row] = told(parity(folder, gguf, compared, chosen.positions))
                        print(row, found["rows"][row], flush=True)
                        found["met"] = all(row["met"] for row in found["rows"].values())
                        write_json(chosen.result, found)


def real(data: Path, folder: Path) -> dict[str, Path]:
    """Tokenizer folders by the kinds of tests/variants.py."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(data / "tokenizers" / "qwen2.5")).save_pretrained(str(folder / "bytes"))
    convert(data / "tokenizers" / "mistral-v3" / "tokenizer.model", folder / "sentencepiece")
    (folder / "sentencepiece" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {kind: folder / kind for kind in ("bytes", "sentencepiece")}


def told(found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    logits, groups = found["logits"], found["tokenisation"]
    sums = {
        f"texts_{key}": sum(group[key] for group in groups.values()) for key in ("equal", "known", "different")
    }
    row = {
        "positions_past_window": found["positions_past_window"],
        "kl_mean": logits["kl_mean"],
        "kl_max": logits["kl_max"],
        "top1": logits["top1"],
        "ties": logits["ties"],
        "top1_or_tie": logits["top1"] + logits["ties"] / logits["tokens"],
        "max_abs": logits["max_abs"],
        **sums,
        "lines_equal": groups["lines"]["equal"],
        "added_tokens": found["added_tokens"],
        "ids_different": len(found["ids"]["different"]),
    }
    row["met"] = (
        row["kl_mean"] < BARS["kl_mean"]
        and row["top1_or_tie"] == BARS["top1_or_tie"]
        and row["texts_different"] == BARS["texts_different"]
        and row["ids_different"] == BARS["ids_different"]
    )
    if row["texts_different"]:
        row["examples"] = {name: group["example"] for name, group in groups.items() if group["different"]}
    return row


if __name__ == "__main__":
    main()
