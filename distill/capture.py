"""A teacher's distribution on every response token, stored once.

The stage: which conversations are used, over which ids the distribution is, and what is kept of it. The forward
pass is in teacher.py, what is kept in topk.py and sampling.py, resume and ranks in shards.py, bytes in
store.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from distill.sampling import sampled_columns
from distill.shards import Capture
from distill.teacher import Keep
from distill.topk import top_k_columns
from foundation.dataio import conversations, records
from foundation.errors import InputError, ModelError
from foundation.files import DigestCache
from foundation.model import context_tokens, load, read_config
from foundation.ranks import is_main, rank, world
from foundation.report import Report
from foundation.rows import Row, rows_of_each
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer

NAMED = 10  # conversations left out that a note names; it counts the others


class Settings(StageSettings):
    """How much of the teacher's distribution is kept, and how the teacher is run."""

    support: Literal["top_k", "sampled"] = Field(
        "top_k", description="the most probable ids with the tail's mass, or unbiased random draws"
    )
    top_k: int = Field(100, ge=1, le=4096, description="most ids kept for a token (support = 'top_k')")
    mass: float = Field(
        1.0, gt=0, le=1, description="the fewest ids that reach this probability are kept; 1 = always top_k"
    )
    draws: int = Field(50, ge=1, le=4096, description="draws for a token (support = 'sampled')")
    power: float = Field(1.0, gt=0, le=2, description="draws come from p^power; 1 has the least variance")
    bits: int = Field(6, ge=2, le=12, description="bits of a stored log-probability")
    temperature: float = Field(1.0, ge=0.05, le=100, description="the teacher's logits are divided by it")
    batch_tokens: int = Field(8192, ge=1, description="most tokens in one forward pass, padding included")
    shard_rows: int = Field(256, ge=1, description="conversations in one shard: the most a kill can cost")
    max_tokens: int = Field(1024, ge=8, description="longest conversation that is used")
    precision: Literal["fp32", "bf16", "nf4"] = Field(
        "fp32", description="of the teacher's weights; a GPU wants bf16, or nf4 (4 bits, bitsandbytes)"
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="processes under torchrun, each with its own GPU",
        # The shards are the same, but for last bits of logits that depend on the threads of a process.
        json_schema_extra={"fingerprint": False},
    )

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> Settings:
        silent = {"top_k": ("draws", "power"), "sampled": ("top_k", "mass")}[self.support]
        for name in self.changed(silent):
            raise ValueError(f"{name} has no effect with support = {self.support!r}")
        return self

    @property
    def entries(self) -> int:
        """The most entries that a position can have."""
        return self.top_k if self.support == "top_k" else self.draws

    @property
    def keep(self) -> Keep:
        """What is kept of a chunk of logits."""
        if self.support == "top_k":
            return lambda logits, gold, _: top_k_columns(logits, gold, self.top_k, self.mass)
        return partial(sampled_columns, power=self.power)


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/store from `teacher` and `data`. Figures are rank 0's; the other ranks have none.

    Raises InputError when no conversation fits or an answer is empty, ModelError when the teacher can not be
    run or has too few tokens for these settings, StopRequested between two shards, with all that was captured
    on disk.
    """
    folder = one(inputs, "teacher")
    tokenizer = Tokenizer(folder)
    longest = min(settings.max_tokens, context_tokens(folder))
    rows, too_long = fitting_rows(many(inputs, "data"), tokenizer, longest, report)
    cut_rows = _cut_rows(settings, folder, tokenizer, rows, report)
    capture = Capture(settings, tokenizer, rows, out)
    mine = range(rank(), len(capture.parts), world())
    if missing := capture.missing(mine, report):
        capture.write(load(folder, precision=settings.precision), missing, report)
    if not is_main():
        return {}
    shards = capture.wait(mine, report)
    header = capture.seal(shards, DigestCache().content(folder))
    size_bytes = sum(shard.size_bytes for shard in shards)
    return {
        "rows": len(rows),
        "too_long": too_long,
        "cut_rows": cut_rows,
        "tokens": header.positions,
        "bytes_per_token": size_bytes / header.positions,
        **capture.means(),
    }


def fitting_rows(
    paths: Sequence[Path], tokenizer: Tokenizer, longest: int, report: Report
) -> tuple[list[Row], int]:
    """The rows of at most `longest` tokens, in order, and how many are longer.

    Those are left out, counted, and named by file and line in a note. Raises InputError when none is left.
    """
    fitting: list[Row] = []
    long: list[tuple[int, int]] = []  # (place of the conversation, tokens)
    for place, rows in enumerate(rows_of_each(conversations(paths), tokenizer)):
        fitting += [row for row in rows if len(row["input_ids"]) <= longest]
        long += [(place, tokens) for row in rows if (tokens := len(row["input_ids"])) > longest]
    if long:
        places = [f"{path}, line {line}" for path in paths for line, _ in records(path)]
        named = "; ".join(f"{places[place]} ({tokens} tokens)" for place, tokens in long[:NAMED])
        said = named + (f"; and {len(long) - NAMED} more" if len(long) > NAMED else "")
        if not fitting:
            raise InputError(
                f"no conversation fits {longest} tokens: {said}",
                hint="raise max_tokens, up to the context that the teacher was made for",
            )
        count = len(fitting) + len(long)
        report.note(f"{len(long)} of {count} rows exceed {longest} tokens and are left out: {said}")
    return fitting, len(long)


def _cut_rows(settings: Settings, folder: Path, tokenizer: Tokenizer, rows: list[Row], report: Report) -> int:
    """How many rows of the teacher's head no token stands behind. Raises ModelError where V does not fit.

    They are cut before the softmax, which renormalises: a student padded with zero logits in their place would
    be taught that ids which nobody can write have mass.
    """
    vocab_tokens = len(tokenizer)
    if settings.support == "top_k" and settings.top_k >= vocab_tokens:
        raise ModelError(
            f"top_k = {settings.top_k}; the teacher has {vocab_tokens} tokens, so at most {vocab_tokens - 1}"
        )
    if (highest := max(int(row["input_ids"].max()) for row in rows)) >= vocab_tokens:
        raise ModelError(
            f"{folder}: id {highest} in a tokenizer of {vocab_tokens} tokens: its ids have holes",
            hint="a distribution is stored over the ids 0 .. tokens - 1; renumber the tokenizer",
        )
    cut = max(0, int(read_config(folder).get("vocab_size", vocab_tokens)) - vocab_tokens)
    if cut:
        report.note(f"the teacher has {cut} rows beyond the tokenizer's {vocab_tokens} tokens; they are cut")
    return cut
