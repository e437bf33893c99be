"""Learned embedding propagation: carry new embeddings from an adapted base model to its instruct model.

Source: LEP (arXiv 2412.21140). The base model was given another vocabulary (extended, substituted, optimised)
and trained; the instruct model is another descendant of the same base. Rows are embeddings, and
E_new = E_adapted @ P, where P is fitted, in fp64, to lead from the base's rows to the instruct model's:

    swap        P = I
    overlap     A, B = rows of base and instruct for the tokens of both vocabularies
    conversion  A, B = T @ base, T @ instruct; T averages the old pieces of each token of the new vocabulary
                (the row of a token that stayed is its own; paper, eq. 13-14)

Input embeddings and LM head are fitted apart, tied ones once. Then the rows of added (control) tokens are
taken from the instruct model. Every other tensor is the instruct model's, plus a share of what training
changed in the adapted base: LoRA deltas of its layers, which the paper scales by 1 / alpha_scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adaptation.ids import follow_ids, write_generation_config
from adaptation.least_squares import Fit, fit
from adaptation.pieces import BLOCK_ROWS, added_tokens, averages, kept, token_map
from adaptation.tokenizer_json import TokenizerJson, renumbered
from adaptation.weights import HEAD_BIAS, Matrix, Model
from foundation.errors import ModelError
from foundation.model import read_config
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, one
from foundation.tensors import HEAD, write_config, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HOPELESS = 0.85  # residual above which the two models' rows have little to do with each other
FIT_ROWS = 4096  # rows of a block of the fit, or twice the width where that is more
BLOCK_NUMBERS = 2**24  # of a layer, carried at once
SHARD_BYTES = 2**30  # of the model written: tensors are held until a shard is full, and the fit needs the room


class Settings(StageSettings):
    """How the projection is fitted, and what becomes of the adapted base's layers."""

    method: Literal["swap", "overlap", "conversion"] = Field(
        "conversion", description="what the projection is fitted to; conversion was best or tied in the paper"
    )
    layers_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the changes in the adapted base's layers that is added to the instruct model's "
        "(1 / alpha_scale of the paper); 0 carries embeddings alone",
    )


@dataclass(frozen=True)
class Three:
    """The models, known to fit together, and which rows belong to which."""

    base: Model
    adapted: Model
    instruct: Model

    @classmethod
    def of(cls, inputs: Inputs) -> Three:
        """Raises ModelError, naming all that differs, unless the three can be one family."""
        three = cls(*(Model.read_folder(one(inputs, role)) for role in ("base", "adapted", "instruct")))
        check_tokenizers(three.base.tokenizer, three.adapted.tokenizer, three.instruct.tokenizer)
        _check_matrices(three)
        return three

    def rows_of(self, method: str) -> list[list[int]]:
        """Rows of base and instruct whose averages the projection is fitted to."""
        new, old = self.adapted.tokenizer, self.base.tokenizer
        if method == "conversion":
            return [ids for ids in token_map(new, old) if ids]
        return [[i] for i in sorted(set(kept(new, old).values()))]

    def control(self) -> dict[int, int]:
        """Row of adapted -> row of instruct, for the added tokens of both."""
        ours, theirs = (added_tokens(model.tokenizer) for model in (self.adapted, self.instruct))
        return {ours[token]: i for token, i in theirs.items() if token in ours}


@dataclass
class Change:
    """What training changed in the adapted base's layers."""

    names: list[str] = field(default_factory=list)
    squares: float = 0.0  # of the change
    whole: float = 0.0  # of base

    @property
    def relative(self) -> float:
        """||adapted - base|| / ||base||."""
        return (self.squares / self.whole) ** 0.5 if self.whole else 0.0


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Give `instruct` the vocabulary of `adapted`, a descendant of `base`; writes out/model."""
    three = Three.of(inputs)
    adapted, instruct = three.adapted, three.instruct
    layers = _layers(three, settings.layers_share)
    config = follow_ids(read_config(instruct.folder), instruct.tokenizer, adapted.tokenizer)
    control = three.control()
    change, figures = Change(), Figures(embedding_rows=adapted.shape[0], control_rows=len(control))

    def propagated(which: Matrix) -> Tensor:
        target = instruct.matrix(which)
        projection = None
        if settings.method != "swap":
            fitted = _fitted(three, which, settings.method, out / ".work", report)
            _tell(fitted, which, report, figures)
            projection = fitted.projection
        rows = project(adapted.matrix(which), projection, target.dtype)
        rows[list(control)] = target[list(control.values())]
        return rows

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, name in enumerate(instruct.files, start=1):
            stop_if_asked(report)
            if name == instruct.files.embedding():
                yield name, propagated("embeddings")
            elif name == HEAD:
                yield name, propagated("head" if instruct.own_head else "embeddings")
            elif name in layers:
                yield name, carried(name, three, settings.layers_share, change)
            else:
                yield name, instruct.read(name)
            report.progress(done, len(instruct.files), "tensor")

    folder = out / "model"
    write_tensors(folder, tensors(), SHARD_BYTES)
    write_config(folder, config, adapted.shape[0])
    _write_tokenizer(adapted.tokenizer, instruct.tokenizer, folder)
    write_generation_config(instruct.folder, folder, instruct.tokenizer, adapted.tokenizer)
    if change.names and not settings.layers_share:
        report.note(
            f"adapted differs from base in {len(change.names)} of {len(layers)} other tensors "
            f"({change.names[0]}, ...): only embeddings are propagated, those changes are left behind; "
            "layers_share carries them"
        )
    return figures | {"layers_changed": len(change.names), "layers_change": change.relative}


def check_tokenizers(base: TokenizerJson, adapted: TokenizerJson, instruct: TokenizerJson) -> None:
    """Raise ModelError, naming all that differs, unless `instruct` cuts text as `base` does, and `adapted` has
    every control token of `instruct`.
    """
    problems = []
    differing = sorted(
        t for t in base.vocab.keys() | instruct.vocab.keys() if base.vocab.get(t) != instruct.vocab.get(t)
    )
    if differing:
        problems.append(f"base and instruct differ in {len(differing)} tokens, among them {differing[:3]}")
    if base.merges != instruct.merges:
        problems.append("base and instruct differ in their merges")
    for part in ("normalizer", "pre_tokenizer"):
        if base.content.get(part) != instruct.content.get(part):
            problems.append(f"base and instruct differ in their {part}")
    if lacking := sorted(added_tokens(instruct).keys() - added_tokens(adapted).keys()):
        problems.append(f"adapted lacks {len(lacking)} control tokens of instruct, among them {lacking[:3]}")
    if problems:
        raise ModelError(
            "; ".join(problems),
            hint="base and instruct must be of one family, and adapted made from that base; where only control "
            "tokens differ, adaptation.embeddings gives base the instruct model's tokenizer: adapt that one",
        )


def project(matrix: Tensor, projection: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`matrix` @ `projection` (None: the identity), multiplied in fp64, returned in `dtype`.  # [V, D]"""
    import torch

    out = torch.empty(len(matrix), (matrix if projection is None else projection).shape[1], dtype=dtype)
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS]
        out[start : start + BLOCK_ROWS] = block if projection is None else block.double() @ projection
    return out


def carried(name: str, three: Three, share: float, change: Change) -> Tensor:
    """instruct + share * (adapted - base) of one tensor, in fp64, rounded once; `change` takes note."""
    base, adapted, instruct = (
        model.read(name).flatten() for model in (three.base, three.adapted, three.instruct)
    )
    out = instruct.clone() if share else instruct
    squares = 0.0
    for start in range(0, len(base), BLOCK_NUMBERS):
        part = slice(start, start + BLOCK_NUMBERS)
        old = base[part].double()
        delta = adapted[part].double() - old
        squares += float(delta.square().sum())
        change.whole += float(old.square().sum())
        if share:
            out[part] = (instruct[part].double() + share * delta).to(out.dtype)
    if not squares:
        return three.instruct.read(name)
    change.names.append(name)
    change.squares += squares
    return out.reshape(three.instruct.files.shape(name))


def _fitted(three: Three, which: Matrix, method: str, work: Path, report: Report) -> Fit:
    """The fit, or what a run that was killed had fitted."""
    path = work / f"{which}.safetensors"
    if path.is_file():
        return Fit.read(path)
    base, instruct, rows = three.base.matrix(which), three.instruct.matrix(which), three.rows_of(method)
    most = max(FIT_ROWS, 2 * base.shape[1])
    if not rows:
        raise ModelError(
            "adapted and base have no token in common", hint="use method = 'conversion', or another base"
        )

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(rows), most):
            stop_if_asked(report)
            block = rows[start : start + most]
            yield averages(base, block), averages(instruct, block)
            report.progress(min(len(rows), start + most), len(rows), f"row of {which}")

    fitted = fit(blocks())
    work.mkdir(parents=True, exist_ok=True)
    fitted.write(path)
    return fitted


def _tell(fitted: Fit, which: Matrix, report: Report, figures: Figures) -> None:
    hidden = len(fitted.projection)
    figures[f"residual_{which}"] = fitted.residual
    figures[f"condition_{which}"] = fitted.condition
    if fitted.residual > HOPELESS:
        report.note(
            f"{which}: the fit leaves {fitted.residual:.0%} of the instruct model's rows unexplained; "
            "are base and instruct of one family?"
        )
    if fitted.rank < hidden:
        report.note(
            f"{which}: the rows span {fitted.rank} of {hidden} dimensions; the others are left as they are"
        )


def _check_matrices(three: Three) -> None:
    models = {"base": three.base, "adapted": three.adapted, "instruct": three.instruct}
    if three.base.shape != three.instruct.shape:
        raise ModelError(
            f"embeddings of base are {list(three.base.shape)}, of instruct {list(three.instruct.shape)}",
            hint="base and instruct must be of one size; where only rows differ, adaptation.embeddings gives "
            "base the instruct model's tokenizer",
        )
    if three.adapted.shape[1] != three.base.shape[1]:
        raise ModelError(
            f"embeddings of base are {list(three.base.shape)}, of adapted {list(three.adapted.shape)}: "
            "another width",
            hint="adapted must be made from this base",
        )
    biased = [name for name, model in models.items() if HEAD_BIAS in model.files]
    if biased:
        raise ModelError(
            f"{', '.join(biased)}: the head has a bias ({HEAD_BIAS}); propagation is defined for rows alone",
            hint="give the instruct model its vocabulary with adaptation.embeddings, and train on",
        )
    heads = {name: model.own_head for name, model in models.items()}
    if len(set(heads.values())) > 1:
        raise ModelError(
            "an LM head of its own: "
            + ", ".join(f"{name} {'yes' if own else 'no'}" for name, own in heads.items()),
            hint="the three must be tied, or all untied; training may have untied one",
        )


def _layers(three: Three, share: float) -> set[str]:
    """Names of the tensors beside the vocabulary's, in floating point, that all three have in one shape.

    Raises ModelError where changes are to be carried and the others are not none.
    """
    models = (three.base, three.adapted, three.instruct)
    vocabulary = {HEAD, *(model.files.embedding() for model in models)}
    names = set().union(*(model.files for model in models)) - vocabulary
    odd = {}
    for name in sorted(names):
        shapes = [model.files.shape(name) if name in model.files else None for model in models]
        if len(set(shapes)) > 1:
            odd[name] = ", ".join("none" if shape is None else str(list(shape)) for shape in shapes)
    if odd and share:
        first = next(iter(odd))
        raise ModelError(
            f"{len(odd)} tensors differ in shape between base, adapted and instruct: {first} is {odd[first]}",
            hint="changes of layers can be carried between models of one architecture; or layers_share = 0",
        )
    return {n for n in names - odd.keys() if three.instruct.files.dtype(n).startswith(("F", "BF"))}


def _write_tokenizer(adapted: TokenizerJson, instruct: TokenizerJson, folder: Path) -> None:
    """The adapted vocabulary under the instruct model's control tokens, template and configuration."""
    ids = adapted.vocab
    control = {t["id"]: t for t in adapted.added} | {
        ids[t["content"]]: t | {"id": ids[t["content"]]} for t in instruct.added
    }
    kept_parts = {"added_tokens": [control[i] for i in sorted(control)]}
    if "post_processor" in instruct.content:
        kept_parts["post_processor"] = renumbered(instruct.content["post_processor"], ids)
    TokenizerJson(instruct.folder, adapted.content | kept_parts).write(folder)
