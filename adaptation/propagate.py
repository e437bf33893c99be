"""Learned embedding propagation: carry new embeddings from an adapted base model to its instruct model.

Source: LEP (arXiv 2412.21140). The base model was extended and its embeddings trained; the instruct model is
another descendant of the same base. Rows are embeddings, and E_new = E_donor @ P, where P is fitted, in fp64,
to lead from the base's rows to the instruct model's:

    swap        P = I
    overlap     A, B = rows of base and instruct for the tokens of both vocabularies
    conversion  A, B = T @ base, T @ instruct; T averages the old pieces of each token of the new vocabulary
                (the row of an old token is its own; paper, eq. 13-14)

Input embeddings and LM head are fitted apart, tied ones once. Then the rows of added (control) tokens are
taken from the instruct model. Every other tensor is the instruct model's: changes of the donor's layers are
not carried.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adaptation.embeddings import added_tokens
from adaptation.least_squares import Fit, fit
from adaptation.pieces import BLOCK_ROWS, averages, old_pieces
from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError
from foundation.model import read_config
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, one
from foundation.tensors import HEAD, TensorFiles, write_config, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Matrix = Literal["embeddings", "head"]


class Settings(StageSettings):
    """How the projection is fitted."""

    method: Literal["swap", "overlap", "conversion"] = Field(
        "conversion", description="what the projection is fitted to; conversion was best or tied in the paper"
    )


@dataclass(frozen=True)
class Model:
    """One of the three: its folder, its tokenizer and its tensors."""

    folder: Path
    tokenizer: TokenizerJson
    files: TensorFiles

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Raises ModelError when a token has no row."""
        model = cls(folder, TokenizerJson.read(folder), TensorFiles(folder))
        rows = model.files.shape(model.files.embedding())[0]
        if rows < model.tokenizer.size:
            raise ModelError(f"{folder}: {rows} rows of embeddings for {model.tokenizer.size} tokens")
        return model

    @property
    def hidden(self) -> int:
        return self.files.shape(self.files.embedding())[1]

    @cached_property
    def own_head(self) -> bool:
        """True when the LM head is another matrix than the input embeddings; a tied one may be stored too."""
        import torch

        return HEAD in self.files and not torch.equal(self.matrix("head"), self.matrix("embeddings"))

    def matrix(self, which: Matrix) -> Tensor:
        """Input embeddings or LM head.  # [V, D]"""
        return self.files.read(HEAD if which == "head" else self.files.embedding())


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Give `instruct` the vocabulary of `adapted`, a descendant of `base`; writes out/model."""
    base, adapted, instruct = (Model.read(one(inputs, role)) for role in ("base", "adapted", "instruct"))
    added = check_tokenizers(base.tokenizer, adapted.tokenizer, instruct.tokenizer)
    _check_matrices(base, adapted, instruct)
    _note_other_layers(base, adapted, report)
    pieces = [[i] for i in sorted(set(base.tokenizer.vocab.values()))]
    if settings.method == "conversion":
        pieces += old_pieces(added.values(), base.tokenizer)
    control = control_ids(adapted.tokenizer, instruct.tokenizer)
    figures: Figures = {
        "embedding_rows": adapted.files.shape(adapted.files.embedding())[0],
        "control_rows": len(control),
    }

    def propagated(which: Matrix) -> Tensor:
        donor, target = adapted.matrix(which), instruct.matrix(which)
        rows = donor.to(target.dtype, copy=True)
        if settings.method != "swap":
            fitted = fit(_blocks(pieces, base.matrix(which), target))
            _tell(fitted, which, donor.shape[1], report, figures)
            rows = project(donor, fitted.projection, target.dtype)
        rows[control] = target[control]
        return rows

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(instruct.files.items(), start=1):
            stop_if_asked(report)
            if name == instruct.files.embedding():
                tensor = propagated("embeddings")
            elif name == HEAD:
                tensor = propagated("head" if instruct.own_head else "embeddings")
            yield name, tensor
            report.progress(done, len(instruct.files), "tensor")

    folder = out / "model"
    write_tensors(folder, tensors())
    write_config(folder, read_config(instruct.folder), int(figures["embedding_rows"]))
    _write_tokenizer(adapted.tokenizer, instruct.tokenizer, folder)
    if (instruct.folder / "generation_config.json").is_file():
        shutil.copyfile(instruct.folder / "generation_config.json", folder / "generation_config.json")
    return figures


def check_tokenizers(base: TokenizerJson, adapted: TokenizerJson, instruct: TokenizerJson) -> dict[int, str]:
    """Id -> token of what `adapted` has beyond `base`.

    Raises ModelError, naming all that differs, unless `instruct` has `base`'s vocabulary and `adapted`
    extends it.
    """
    problems = []
    differing = sorted(
        t for t in base.vocab.keys() | instruct.vocab.keys() if base.vocab.get(t) != instruct.vocab.get(t)
    )
    if differing:
        problems.append(f"base and instruct differ in {len(differing)} tokens, among them {differing[:3]}")
    if base.merges != instruct.merges:
        problems.append("base and instruct differ in their merges")
    rest = iter(adapted.merges)
    if not all(merge in rest for merge in base.merges):
        problems.append("adapted lacks merges of base, or has them in another order")
    for other, name in ((instruct, "instruct"), (adapted, "adapted")):
        for part in ("normalizer", "pre_tokenizer"):
            if base.content.get(part) != other.content.get(part):
                problems.append(f"base and {name} differ in their {part}")
    if problems:
        raise ModelError(
            "; ".join(problems),
            hint="base and instruct must be of one family, and adapted an extension of that base",
        )
    return added_tokens(base, adapted)


def control_ids(adapted: TokenizerJson, instruct: TokenizerJson) -> list[int]:
    """Ids of the added tokens that both have, sorted."""
    return sorted({t["id"] for t in adapted.added} & {t["id"] for t in instruct.added})


def project(matrix: Tensor, projection: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix` @ `projection`, multiplied in fp64, returned in `dtype`.  # [V, D]"""
    import torch

    return torch.cat([(block.double() @ projection).to(dtype) for block in matrix.split(BLOCK_ROWS)])


def _blocks(pieces: list[list[int]], old: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row blocks of (T @ old, T @ target)."""
    for start in range(0, len(pieces), BLOCK_ROWS):
        block = pieces[start : start + BLOCK_ROWS]
        yield averages(old, block), averages(target, block)


def _tell(fitted: Fit, which: Matrix, hidden: int, report: Report, figures: Figures) -> None:
    figures[f"residual_{which}"] = fitted.residual
    figures[f"condition_{which}"] = fitted.condition
    if fitted.rank < hidden:
        report.note(
            f"{which}: the rows span {fitted.rank} of {hidden} dimensions; the others are left as they are"
        )


def _check_matrices(base: Model, adapted: Model, instruct: Model) -> None:
    sizes = {name: m.hidden for name, m in (("base", base), ("adapted", adapted), ("instruct", instruct))}
    if len(set(sizes.values())) > 1:
        raise ModelError(f"hidden sizes differ: {sizes}", hint="base and instruct must be of one size")
    heads = {name: m.own_head for name, m in (("base", base), ("adapted", adapted), ("instruct", instruct))}
    if len(set(heads.values())) > 1:
        raise ModelError(
            "an LM head of its own: "
            + ", ".join(f"{name} {'yes' if own else 'no'}" for name, own in heads.items()),
            hint="the three must be tied, or all untied; training may have untied one",
        )


def _note_other_layers(base: Model, adapted: Model, report: Report) -> None:
    """Say when training changed more of the donor than its vocabulary matrices."""
    import torch

    ours = {base.files.embedding(), adapted.files.embedding(), HEAD}
    names = sorted((set(base.files) | set(adapted.files)) - ours)
    changed = [
        name
        for name in names
        if name not in base.files
        or name not in adapted.files
        or not torch.equal(base.files.read(name).double(), adapted.files.read(name).double())
    ]
    if changed:
        report.note(
            f"adapted differs from base in {len(changed)} of {len(names)} other tensors ({changed[0]}, ...): "
            "only embeddings are propagated, those changes are left behind"
        )


def _write_tokenizer(adapted: TokenizerJson, instruct: TokenizerJson, folder: Path) -> None:
    """The adapted vocabulary under the instruct model's control tokens, template and configuration."""
    kept = {
        part: instruct.content[part] for part in ("added_tokens", "post_processor") if part in instruct.content
    }
    TokenizerJson(instruct.folder, adapted.content | kept).write(folder)
