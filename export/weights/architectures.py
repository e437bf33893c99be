"""What each model family becomes in GGUF: metadata keys, tensor names, and how weights are rearranged.

One row of `TARGETS` a family. Four facts break a model silently when forgotten, so they stand here:
llama.cpp rotates neighbouring pairs for "llama", transformers rotates halves (Q and K rows are
reordered); Gemma's norms multiply by 1 + weight in transformers and by weight in llama.cpp; llama3
rope scaling is not a key but a tensor of divisors; Gemma 3's attention scale is not a key either, and
what llama.cpp takes in its place depends on the number of layers, so the ratio goes into the query norm.
What llama.cpp can not compute is refused by name.

Source: llama.cpp's conversion scripts and graphs (src/models), checked by export.verify on logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from export.weights.checkpoint import Checkpoint, floats
from foundation.errors import ModelError
from foundation.shape import FAMILIES, ModelShape

if TYPE_CHECKING:
    import numpy as np

SKIPPED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers of old checkpoints, computed anew
GEMMA_27B_LAYERS = 62  # as many as llama.cpp takes for the 27B model


@dataclass(frozen=True)
class Target:
    """How a family is written."""

    arch: str  # general.architecture
    ropes: tuple[str, ...] = ("default", "linear")  # rope types that llama.cpp's graph computes
    pairs: bool = False  # rotary embedding turns neighbouring pairs: Q and K rows are reordered
    norm_plus_one: bool = False  # transformers keeps norm weights minus one
    windows: bool = False  # the graph knows sliding windows
    rope_size: bool = False  # wants rope.dimension_count
    square_query: bool = False  # the graph takes heads * head_dim to be the hidden size


TARGETS: dict[str, Target] = {
    "llama": Target("llama", ropes=("default", "linear", "llama3"), pairs=True, rope_size=True),
    "mistral": Target("llama", pairs=True, rope_size=True),
    "qwen2": Target("qwen2", square_query=True),
    "qwen3": Target("qwen3"),
    "gemma3_text": Target("gemma3", norm_plus_one=True, windows=True),
}


def check(shape: ModelShape) -> Target:
    """The row for this shape. Raises ModelError with everything that llama.cpp would compute wrongly."""
    target, family = TARGETS[shape.model_type], FAMILIES[shape.model_type]
    problems = []
    if shape.rope.kind not in target.ropes:
        problems.append(f"rope type {shape.rope.kind!r}; exported are {', '.join(target.ropes)}")
    if any(shape.windows) and not target.windows:
        problems.append(f"sliding windows of {max(w or 0 for w in shape.windows)} tokens, ignored by llama.cpp")
    if len({w for w in shape.windows if w}) > 1:
        problems.append("several window sizes in one model")
    if target.square_query and shape.heads * shape.head_dim != shape.hidden:
        problems.append(f"{shape.heads} heads of {shape.head_dim} are not the hidden size {shape.hidden}")
    if shape.activation not in family.activations:
        problems.append(f"activation {shape.activation!r}; computed is {', '.join(family.activations)}")
    if shape.softcapping:
        problems.append("soft-capped logits")
    if problems:
        raise ModelError(
            f"this {shape.model_type} can not be exported: " + "; ".join(problems),
            hint="cap_context writes a model with sliding windows for contexts up to one window"
            if any(shape.windows) and not target.windows
            else "a checkpoint without these features can",
        )
    return target


def capped(shape: ModelShape) -> ModelShape:
    """The shape with a context of one sliding window, where llama.cpp would ignore the windows; else `shape`.

    Up to so many tokens a window hides nothing, and full attention computes the same.
    """
    if TARGETS[shape.model_type].windows or not any(shape.windows):
        return shape
    window = min(w for w in shape.windows if w)
    return replace(shape, context=min(shape.context, window), windows=(None,) * shape.layers)


def describe(writer: Any, shape: ModelShape, target: Target) -> None:
    """Write the architecture's keys to a GGUFWriter."""
    import gguf

    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_rope_freq_base(shape.rope.theta)
    if target.rope_size:
        writer.add_rope_dimension_count(shape.head_dim)
    if shape.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope.factor)
    if target.windows and any(shape.windows):
        # A list with one entry a layer: a period would be wrong for a model that lost layers.
        writer.add_sliding_window(max(w or 0 for w in shape.windows))
        writer.add_sliding_window_pattern([w is not None for w in shape.windows])
        writer.add_rope_freq_base_swa(shape.rope.local_theta)


def tensor_names(shape: ModelShape, target: Target, checkpoint: Checkpoint) -> dict[str, str]:
    """Checkpoint name -> GGUF name, in file order. Raises ModelError: missing, unknown or misshapen tensors."""
    wanted = shape.tensors()
    present = {n for n in checkpoint.names() if not n.endswith(SKIPPED)}
    if shape.tied:
        present.discard("lm_head.weight")  # a copy of the embedding
    problems = [f"missing {n}" for n in wanted if n not in present]
    problems += [f"unknown {n}" for n in sorted(present) if n not in wanted]
    problems += [
        f"{n} is {checkpoint.shape(n)}, config.json says {size}"
        for n, size in wanted.items()
        if n in present and checkpoint.shape(n) != size
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"{checkpoint.folder}: weights and config.json disagree: {'; '.join(problems[:5])}{more}"
        )
    return gguf_names(shape, target)


def check_tied(shape: ModelShape, checkpoint: Checkpoint) -> None:
    """Raise ModelError when a tied model stores an output matrix that is no copy of the embedding.

    transformers would then use one of them, depending on its version, and llama.cpp the embedding.
    """
    import numpy as np

    output, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not shape.tied or output not in checkpoint.names():
        return
    same = checkpoint.shape(output) == checkpoint.shape(embedding) and all(
        np.array_equal(a, b)
        for a, b in zip(checkpoint.blocks(output), checkpoint.blocks(embedding), strict=False)
    )
    if not same:
        raise ModelError(
            f"{checkpoint.folder}: {output} is no copy of {embedding}, and config.json says that they are tied",
            hint="set tie_word_embeddings to false, or remove the tensor that is not meant",
        )


def gguf_names(shape: ModelShape, target: Target) -> dict[str, str]:
    """Name of every tensor that the shape has -> GGUF name, in file order."""
    import gguf

    arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == target.arch)
    table = gguf.get_tensor_name_map(arch, shape.layers)
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in shape.tensors()}


def rows(name: str, shape: ModelShape, target: Target, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    """Values of the checkpoint's tensor `name` as llama.cpp wants them, in blocks as `Checkpoint.blocks` gives.

    Where rows are only reordered their type stays; where something is computed it becomes float32.
    """
    import numpy as np

    if target.pairs and (".q_proj." in name or ".k_proj." in name):
        for block in checkpoint.blocks(name, shape.head_dim):  # whole heads
            yield halves_to_pairs(block, len(block) // shape.head_dim)
    elif name.endswith("norm.weight"):
        for block in checkpoint.blocks(name):
            values = floats(block)
            if target.norm_plus_one:
                values = values + 1
            if name.endswith("q_norm.weight"):
                values = values * np.float32(query_factor(shape))
            yield values
    else:
        yield from checkpoint.blocks(name)


def query_factor(shape: ModelShape) -> float:
    """By how much queries are too small or too large under llama.cpp's own attention scale; 1 but for Gemma 3.

    transformers scales scores by query_pre_attn_scalar ** -0.5. llama.cpp scales Gemma 3's by head_dim ** -0.5,
    and with 62 layers, which it takes for the 27B model, by (hidden // heads) ** -0.5. So a 27B that lost
    layers is scaled otherwise than a whole one. Rotation is linear: a factor on the query norm is one on the
    scores.
    Source: llama.cpp's hyperparameters of gemma3 (f_attention_scale).
    """
    if shape.query_scalar is None:
        return 1.0
    taken = shape.hidden // shape.heads if shape.layers == GEMMA_27B_LAYERS else shape.head_dim
    return math.sqrt(taken / shape.query_scalar)


def halves_to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows 0,1,..,2n-1 to 0,n,1,n+1,..: partners of a rotation become neighbours.

    rows: [heads * head_dim, ...]
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_divisors(shape: ModelShape) -> list[float] | None:
    """Divisors of the rotary frequencies under llama3 scaling, one a pair of dimensions; None for other kinds.

    Wave lengths above the original context divided by low_freq_factor are stretched by `factor`, those
    below it divided by high_freq_factor stay, and between them the frequency is interpolated.
    Source: transformers.modeling_rope_utils._compute_llama3_parameters.
    """
    rope = shape.rope
    if rope.kind != "llama3":
        return None
    divisors = []
    for i in range(0, shape.head_dim, 2):
        wave = 2 * math.pi * rope.theta ** (i / shape.head_dim)  # tokens a turn takes
        if wave < rope.original_context / rope.high_freq_factor:
            divisors.append(1.0)
        elif wave > rope.original_context / rope.low_freq_factor:
            divisors.append(rope.factor)
        else:
            smooth = rope.original_context / wave - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            divisors.append(1 / ((1 - smooth) / rope.factor + smooth))
    return divisors
