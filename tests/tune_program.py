"""Run by torchrun in test_tune.py: requests that one rank alone hears, and a torn checkpoint that all meet."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tiny import chats

from foundation.errors import StopRequested
from foundation.losses import cross_entropy
from foundation.model import load, save
from foundation.report import Silent
from foundation.rows import chat_rows
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

RANK = int(os.environ["RANK"])


class Asks(Silent):
    """On rank 0: asks for a checkpoint once `save` steps are done, to stop once `stop` are. Others: never."""

    def __init__(self, save: int = 99, stop: int = 99) -> None:
        super().__init__()
        self.save, self.stop, self.done = save, stop, 0

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.done = done

    def checkpoint_requested(self) -> bool:
        return RANK == 0 and self.done == self.save

    def stop_requested(self) -> bool:
        return RANK == 0 and self.done >= self.stop


def main(folder: Path, out: Path) -> None:
    from accelerate import PartialState

    tokenizer = Tokenizer(folder)
    rows, *_ = chat_rows((c["messages"] for c in chats(16)), tokenizer, 100)
    settings = TuneSettings(steps=6, batch_rows=2, warmup_steps=0, checkpoint_every_steps=100)

    def trained(work: Path, report: Silent) -> None:
        model = load(folder)
        tune(model, rows, cross_entropy, settings, work, report, pad_id=tokenizer.pad_id)
        if RANK == 0:
            save(model, folder, work / "model")

    trained(out / "whole", Silent())
    try:
        trained(out / "torn", Asks(save=1, stop=3))
    except StopRequested:
        (out / f"stopped-{RANK}").touch()
    PartialState().wait_for_everyone()
    if RANK == 0:
        (out / "saved.txt").write_text(
            " ".join(sorted(path.parent.name for path in out.glob("torn/*/COMPLETE")))
        )
        (out / "torn" / "checkpoint-5").mkdir()
    PartialState().wait_for_everyone()
    report = Silent()
    trained(out / "torn", report)
    (out / f"notes-{RANK}.txt").write_text("\n".join(report.notes))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
