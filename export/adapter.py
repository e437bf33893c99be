"""Stage export.adapter: a peft LoRA folder becomes a GGUF adapter, so that one base serves several.

For each changed matrix X of the base: `X.lora_a` [r, D_in] and `X.lora_b` [D_out, r]; one alpha for all, and
llama.cpp adds alpha / r * B A x. So what differs from matrix to matrix (alpha_pattern) goes into its B. Where
the base's rows of Q and K were reordered, those of their B are too. Of the embedding, whose rows are looked up,
A lies the other way round: [V, r].

When the base's GGUF file is given, llama.cpp computes with base and adapter, and is compared with peft's model:
in a child process, because llama.cpp ends the one it is in when an assertion fails. Only then does the file get
its name. Without it nothing is proven, and the stage says so.

Source: llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from export import about
from export.about import About
from export.ggufs import quantisation
from export.lora import EMBEDDING, Lora, read_lora
from export.parity.divergence import Comparison
from export.parity.original import load_original, original_logits
from export.verify import GATES, Gate
from export.weights.architectures import Target, check, gguf_names, halves_to_pairs
from export.weights.checkpoint import Checkpoint
from export.weights.writer import NO_SPACE
from foundation.child import in_child
from foundation.errors import ModelError
from foundation.files import check_space
from foundation.gguf_header import find
from foundation.llama import LlamaModel
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, many, one

if TYPE_CHECKING:
    import numpy as np

FILE = "adapter.gguf"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PAST_WINDOW = 64  # tokens that the proof goes beyond a sliding window


class Settings(StageSettings):
    """Settings of export.adapter."""

    dtype: Literal["f32", "f16"] = Field("f32", description="type of the adapter's matrices")
    adapter_name: str = Field(
        "adapter", description="general.name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$"
    )
    base_model: str = Field(
        "",
        description="the base's name on the Hugging Face hub; empty = as adapter_config.json says, if it does",
        pattern=rf"^({HUB_NAME.pattern})?$",
    )
    tokens: int = Field(
        200, ge=16, description="tokens whose logits are compared, where the base's GGUF is given"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read roles `adapter`, `model` (its base), `gguf` (the base's file, optional); write `out`/adapter.gguf.

    Raises ModelError for what is no plain LoRA, does not fit the base, or computes otherwise than peft.
    """
    folder, adapter = one(inputs, "model"), one(inputs, "adapter")
    shape = ModelShape.from_folder(folder)
    target = check(shape)
    lora = read_lora(adapter, shape, Checkpoint(folder))
    partial = out / ".work" / FILE
    partial.parent.mkdir(parents=True, exist_ok=True)
    check_space(partial.parent, lora.parameters() * {"f32": 4, "f16": 2}[settings.dtype], NO_SPACE)
    _write(partial, settings, shape, target, lora, report)
    figures: Figures = {
        "matrices": len(lora.pairs),
        "rank": max(pair.rank for pair in lora.pairs.values()),
        "size_bytes": partial.stat().st_size,
    }
    if files := many(inputs, "gguf"):
        base = find(files[0])
        gate = _gate(base, settings.dtype)
        asked = {"model": folder, "adapter": adapter, "gguf": base, "written": partial}
        found = in_child(
            "export.adapter:compare",
            {name: str(path) for name, path in asked.items()}
            | {"tokens": settings.tokens, "seed": settings.seed},
            report,
        )
        _judge(found, gate, base)
        figures |= {name: found[name] for name in ("kl_mean", "kl_max", "top1", "adapter_kl")}
    else:
        report.note("no GGUF file of the base was given: what the adapter computes there was not compared")
    partial.replace(out / FILE)
    return figures


def _write(
    path: Path, settings: Settings, shape: ModelShape, target: Target, lora: Lora, report: Report
) -> None:
    """The adapter as a GGUF file; one pair is in memory at a time."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, target.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    name = settings.base_model or lora.base
    known = HUB_NAME.fullmatch(name) and not Path(name).exists()  # a path is of one machine alone
    about.write(
        About(name=settings.adapter_name, base_models=(name,) if known else ()), writer, lora.parameters()
    )
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names, sizes = gguf_names(shape, target), shape.tensors()
    kind: Any = {"f32": np.float32, "f16": np.float16}[settings.dtype]
    for weight, pair in lora.pairs.items():
        (rows, columns), rank = sizes[weight], pair.rank
        down, up = ((rows, rank), (columns, rank)) if _embeds(weight) else ((rank, columns), (rows, rank))
        for part, size in (("lora_a", down), ("lora_b", up)):
            item = np.dtype(kind)
            writer.add_tensor_info(f"{names[weight]}.{part}", size, item, int(np.prod(size)) * item.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, weight in enumerate(lora.pairs, 1):
        for values in _arranged(weight, shape, target, lora):
            if np.abs(values).max() > np.finfo(kind).max:
                raise ModelError(
                    f"{weight}: its adapter holds {np.abs(values).max():g}, too much for {settings.dtype}",
                    hint="set dtype = 'f32'",
                )
            writer.write_tensor_data(np.ascontiguousarray(values, kind))
        report.progress(done, len(lora.pairs), "matrix")
        stop_if_asked(report)
    writer.close()


def _arranged(weight: str, shape: ModelShape, target: Target, lora: Lora) -> tuple[np.ndarray, np.ndarray]:
    """A and B as llama.cpp wants them: the embedding's A turned, B scaled, its rows in pairs."""
    import numpy as np

    down, up = lora.read(weight)  # [r, D_in], [D_out, r]
    up = up * np.float32(lora.factor(weight))
    if _embeds(weight):
        return down.T, up  # [V, r], [D, r]
    if target.pairs and ".q_proj." in weight:
        up = halves_to_pairs(up, shape.heads)
    if target.pairs and ".k_proj." in weight:
        up = halves_to_pairs(up, shape.kv_heads)
    return down, up


def _embeds(weight: str) -> bool:
    return weight == f"{EMBEDDING}.weight"


def compare(
    model: str, adapter: str, gguf: str, written: str, tokens: int, seed: int, report: Report
) -> dict[str, float]:
    """What llama.cpp computes with base `gguf` and adapter `written`, against peft's `model` and `adapter`.

    The figures of Comparison.agreement, and adapter_kl: how far the adapter moves the base (nats), without
    which agreement would say nothing. Ids are random, in windows that reach past a sliding one.
    """
    import numpy as np
    from peft import PeftModel

    shape = ModelShape.from_folder(Path(model))
    past = max((window + PAST_WINDOW for window in shape.windows if window), default=0)
    length = min(shape.context, max(tokens, past))
    ids = np.random.default_rng(seed).integers(0, shape.vocab, (-(-tokens // length), length)).tolist()
    adapted = PeftModel.from_pretrained(load_original(Path(model)), adapter, local_files_only=True).eval()
    agreement, moved = Comparison(), Comparison()
    with LlamaModel(gguf) as opened:
        both = [(opened.adapter(written), 1.0)]
        with (
            opened.context(length, cache="f32", adapters=both) as with_it,
            opened.context(length, cache="f32") as without,
        ):
            for done, window in enumerate(ids, 1):
                wanted = original_logits(adapted, window)  # [T, V]
                for p, q, base in zip(wanted, with_it.logits(window), without.logits(window), strict=True):
                    agreement.add(p, q)
                    moved.add(p, base)
                report.progress(done, len(ids), "window")
                stop_if_asked(report)
    return {**agreement.agreement(), "adapter_kl": moved.agreement()["kl_mean"]}


def _gate(base: Path, dtype: str) -> Gate:
    """What both must reach together: the gate of the coarser. Raises ModelError for a quantised base."""
    kind = quantisation(base)
    if kind not in GATES:
        raise ModelError(
            f"{base.name} is {kind}: how far it is from peft's model says little of the adapter",
            hint=f"give the base in {', '.join(GATES)}; the adapter then goes with the quantised one too",
        )
    one, other = GATES[kind], GATES[dtype.upper()]
    return Gate(max(one.max_kl, other.max_kl), min(one.min_top1, other.min_top1))


def _judge(found: dict[str, float], gate: Gate, base: Path) -> None:
    """Raise ModelError when base and adapter are not peft's model."""
    top1 = found["top1"] + found["ties"] / found["tokens"]
    if found["kl_mean"] <= gate.max_kl and top1 >= gate.min_top1:
        return
    raise ModelError(
        f"{base.name} with the adapter is not peft's model: mean KL {found['kl_mean']:.3g}, "
        f"allowed {gate.max_kl:g}; top-1 agreement {top1:.4f}, required {gate.min_top1:g} "
        f"(the adapter itself moves the base by {found['adapter_kl']:.3g})",
        hint="give the base's GGUF that was made from the folder `model`; else this is a defect of ours",
    )
