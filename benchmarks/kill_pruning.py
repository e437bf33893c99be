"""kill -9 at random moments of pruning, and again after the resume: are all steps the same, bit for bit?

Three kinds of pruning of a tiny model, in turn: by task score with healing of the neighbours, by influence
with healing by LoRA, by the score of generated answers without healing. Half of the layers go, one at a time.
Compared are the order in which they went, and every byte of the result and of every step: models, records and
curves. The moments fall into scoring, cutting, healing, and measuring and publishing a step. How the killing
goes: killing.py.

    python benchmarks/kill_pruning.py --trials 30 --result benchmarks/results/kill_pruning.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from killing import Victim, counted_words, digests, main, words_told

HEALING = {"steps": 8, "batch_rows": 4, "warmup_steps": 2, "learning_rate": 1e-3, "checkpoint_every_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "task score, neighbours heal": {**HEALING, "importance": "task"},
    "influence, LoRA heals": {**HEALING, "importance": "influence", "trains": "lora", "lora_rank": 4},
    "generated answers, no healing": {"importance": "task", "heals": False},
}
COMMON = {"remove_layers": 3, "max_items": 12, "score_rows": 4}
LOUDNESS = (30, 1e-3, 25, 20, 0.1, 15)  # of a layer each, so that they can be told apart


class Pruning(Victim):
    """prune.iterate; its units are words: what it told of its progress, in all starts together."""

    kinds = tuple(KINDS)
    unit = "word"

    def prepare(self, inputs: Path) -> None:
        """A model of six layers, conversations, and questions that it answers itself."""
        import torch
        from tiny import TEXTS, chats, tiny_model
        from transformers import AutoTokenizer

        from evaluation.tasks.rouge import words
        from foundation.dataio import write_jsonl
        from foundation.model import load

        folder = tiny_model(inputs / "model", layers=len(LOUDNESS))
        model: Any = load(folder)
        with torch.no_grad():
            for layer, loud in zip(model.model.layers, LOUDNESS, strict=True):
                layer.self_attn.o_proj.weight.mul_(loud)
                layer.mlp.down_proj.weight.mul_(loud)
        model.save_pretrained(str(folder))
        write_jsonl(inputs / "chats.jsonl", chats())
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        asked = []
        for number in range(60):
            prompt = f"{TEXTS[number % 3][: number + 5]} {number}"
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            made = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
            answer = " ".join(tokenizer.decode(made, skip_special_tokens=True).split())
            if words(answer):
                asked.append({"prompt": prompt, "reference": answer})
        write_jsonl(inputs / "answers.jsonl", asked)

    def warm_up(self, inputs: Path) -> None:
        import peft  # noqa: F401
        import torch._dynamo  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

        import distill.heal  # noqa: F401
        import evaluation.tasks  # noqa: F401
        import export.quants.predict  # noqa: F401
        import prune.iterate  # noqa: F401

    def start(self, inputs: Path, kind: str, out: Path) -> None:
        from distill.heal import heal
        from evaluation.tasks import load_tasks, measure
        from export.quants.predict import gguf_bytes
        from prune import iterate

        read: dict[str, Any] = {"model": inputs / "model", "data": (inputs / "chats.jsonl",)}
        if kind == "generated answers, no healing":
            read["tasks"] = (inputs / "answers.jsonl",)
        iterate.run(
            iterate.Settings(**COMMON, **KINDS[kind]), read, out, counted_words(_words(out)),
            heal=heal, tasks=load_tasks, measure=measure, file_bytes=gguf_bytes,
        )  # fmt: skip

    def done(self, out: Path) -> int:
        return words_told(_words(out))

    def result(self, out: Path) -> dict[str, str]:
        from prune.steps import read_steps

        order = [layer for step in read_steps(out / "steps") for layer in step.removed]
        files = [*(out / "model").rglob("*"), *(out / "steps").rglob("*")]
        return {"order of removal": ", ".join(map(str, order)), **digests(out, files)}

    def state(self, out: Path) -> dict[str, Any]:
        return {**super().state(out), "during": during(out)}


def during(out: Path) -> str:
    """What the kill met, by what lies on the disk."""
    from prune.steps import RECORD

    steps = out / "steps"
    whole = len(list(steps.glob(f"[0-9][0-9]/{RECORD}")))
    work = out / ".work" / f"step-{whole + 1:02d}"
    if (out / "model").exists():
        act = "the result"
    elif (steps / f"{whole + 1:02d}.partial" / "model").exists():
        act = "publishing"
    elif (work / "heal").exists():
        act = "healing"
    elif (work / "costs.json").exists():
        act = "cutting"
    else:
        act = "scoring"
    return f"step {whole + 1}, {act}" if act != "the result" else act


def _words(out: Path) -> Path:
    return out / ".work" / "words"


if __name__ == "__main__":
    sys.exit(main(Pruning(), str(__doc__), "kill-pruning", {**COMMON, **HEALING}))
