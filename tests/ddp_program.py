"""Run by torchrun in test_ddp.py: train a tiny model with `tune` and save it from rank 0."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import chats

from foundation.losses import cross_entropy
from foundation.model import load, save
from foundation.report import Silent
from foundation.rows import chat_rows
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune


def main(folder: Path, out: Path, batch_rows: int) -> None:
    from accelerate import PartialState

    tokenizer = Tokenizer(folder)
    rows, *_ = chat_rows((c["messages"] for c in chats(16)), tokenizer, 100)
    model = load(folder)
    settings = TuneSettings(steps=4, batch_rows=batch_rows, warmup_steps=0, precision="fp32", clip_norm=0)
    tune(model, rows, cross_entropy, settings, out / "work", Silent(), pad_id=tokenizer.pad_id)
    if PartialState().is_main_process:
        save(model, folder, out / "model")
        (out / "kind.txt").write_text(str(PartialState().distributed_type))
    # A rank that leaves while gloo's threads still run aborts: wait for all, then end the group.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
