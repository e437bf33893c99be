"""What a model is made of, read from its config.json alone: no torch, no weights.

Every step that must know sizes before it loads anything (the memory planner, the exporter, a plan's
check that teacher and student fit) asks a `ModelShape`. Architecture facts are one table, `FAMILIES`:
the defaults that transformers fills in for absent keys, and which parts a layer has.

It knows only decoder families that this project exports. It does not read weights: `tensors()` says
which ones the files must hold. Key names: transformers' configuration classes, version 5 and older.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from foundation.artifact import hint_for
from foundation.errors import ModelError
from foundation.gguf_header import MAX_BLOCKS, MAX_CONTEXT, MAX_HEADS, MAX_INNER, MAX_WIDTH

# Sizes beyond these are no model: what walks over layers or tensors would fill the memory with their names.
MOST = {
    "num_hidden_layers": MAX_BLOCKS,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_INNER,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": MAX_HEADS,
}


@dataclass(frozen=True)
class Family:
    """What one model_type adds to the common Llama-like layer, and transformers' defaults for it."""

    tied: bool = False  # tie_word_embeddings when the key is absent
    theta: float = 10_000.0  # rope_theta when absent
    biases: tuple[str, ...] = ()  # attention projections that always have a bias
    query_key_norm: bool = False  # q_norm and k_norm, one weight per head dimension
    sandwich_norm: bool = False  # norms after attention and feed-forward as well (Gemma)
    head_dim: int | None = None  # head_dim when the key is absent; None: hidden_size // num_attention_heads
    window: int | None = None  # sliding_window when the key is absent
    activations: tuple[str, ...] = ("silu",)  # hidden_act that the exporter's target computes


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window=4096),
    "qwen2": Family(biases=("q", "k", "v")),
    "qwen3": Family(query_key_norm=True, head_dim=128),
    "gemma3_text": Family(
        tied=True,
        theta=1_000_000.0,
        query_key_norm=True,
        sandwich_norm=True,
        head_dim=256,
        window=4096,
        activations=("gelu_pytorch_tanh",),
    ),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `kind` is transformers' rope_type: "default", "linear", "llama3", ..."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as the two below
    high_freq_factor: float = 4.0
    original_context: int = 8192  # tokens
    local_theta: float | None = None  # theta of sliding layers, where they have their own (Gemma 3)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. `windows[i]` is layer i's sliding window in tokens, None for full attention."""

    model_type: str
    layers: int
    hidden: int  # D
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # rows of the embedding, V
    context: int  # tokens, max_position_embeddings
    tied: bool  # output matrix is the embedding
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    biases: tuple[str, ...] = ()  # of "q", "k", "v", "o"
    activation: str = "silu"
    query_scalar: float | None = None  # Gemma: attention scale is query_scalar ** -0.5
    softcapping: bool = False  # logits or attention scores squashed by tanh (Gemma 2 style)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """Read `folder`/config.json. Raises ModelError: no such file, not JSON, unsupported, bad sizes."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            hint = "give a folder saved by save_pretrained, or a download of one"
            raise ModelError(f"{folder} holds no config.json", hint=hint_for(path.parent, path.name, hint))
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            hint = "copy it again from its model"
            raise ModelError(f"{path} is not valid JSON: {error}", hint=hint) from error
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Make a shape from the parsed config. Raises ModelError naming every bad key."""
        kind = config.get("model_type") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ModelError(
                f"model_type {str(kind)[:80]!r} is not supported; supported: {', '.join(FAMILIES)}",
                hint="take a text-only checkpoint of one of these families",
            )
        family = FAMILIES[kind]
        keys = _Keys(config)
        layers, hidden = keys.size("num_hidden_layers"), keys.size("hidden_size")
        heads = keys.size("num_attention_heads")
        shape = cls(
            model_type=kind,
            layers=layers,
            hidden=hidden,
            ffn=keys.size("intermediate_size"),
            heads=heads,
            kv_heads=keys.size("num_key_value_heads", heads if kind == "llama" else None),
            head_dim=keys.size("head_dim", family.head_dim or hidden // heads),
            vocab=keys.size("vocab_size"),
            context=keys.size("max_position_embeddings"),
            tied=keys.flag("tie_word_embeddings", family.tied),
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=_rope(keys, family),
            windows=_windows(keys, family, layers),
            biases=_biases(keys, family),
            activation=str(
                config.get("hidden_activation") or config.get("hidden_act") or family.activations[0]
            ),
            query_scalar=keys.number("query_pre_attn_scalar", 256.0) if kind == "gemma3_text" else None,
            softcapping=any(config.get(k) for k in ("attn_logit_softcapping", "final_logit_softcapping")),
        )
        if heads % shape.kv_heads:
            keys.problems.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {shape.kv_heads}"
            )
        if shape.head_dim % 2:
            keys.problems.append(f"head_dim {shape.head_dim} is odd, rotary embedding needs pairs")
        if config.get("mlp_bias"):
            keys.problems.append("mlp_bias true is not supported")
        if keys.problems:
            raise ModelError("config.json: " + "; ".join(keys.problems))
        return shape

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight that a checkpoint holds, layer by layer, as PyTorch keeps them."""
        family = FAMILIES[self.model_type]
        width = {"q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim}
        width["v"], width["o"] = width["k"], self.hidden
        norms = ["input_layernorm", "post_attention_layernorm"]
        if family.sandwich_norm:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            at = f"model.layers.{i}."
            for part in "qkvo":
                inner = width["q"] if part == "o" else self.hidden
                out[f"{at}self_attn.{part}_proj.weight"] = (width[part], inner)
                if part in self.biases:
                    out[f"{at}self_attn.{part}_proj.bias"] = (width[part],)
            if family.query_key_norm:
                out[f"{at}self_attn.q_norm.weight"] = (self.head_dim,)
                out[f"{at}self_attn.k_norm.weight"] = (self.head_dim,)
            out[f"{at}mlp.gate_proj.weight"] = (self.ffn, self.hidden)
            out[f"{at}mlp.up_proj.weight"] = (self.ffn, self.hidden)
            out[f"{at}mlp.down_proj.weight"] = (self.hidden, self.ffn)
            out.update({f"{at}{norm}.weight": (self.hidden,) for norm in norms})
        out["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            out["lm_head.weight"] = (self.vocab, self.hidden)
        return out

    def with_layers(self, layers: int) -> ModelShape:
        """The shape with so many layers, as far as sizes go: one that slides stays, where there is one.

        Raises ModelError for more layers than there are, or none.
        """
        if not 1 <= layers <= self.layers:
            raise ModelError(f"{layers} layers asked, the model has 1..{self.layers}")
        windows = sorted(self.windows, key=lambda window: window is None)
        return replace(self, layers=layers, windows=tuple(windows[:layers]))

    def parameters(self) -> int:
        """Number of weights; a tied output matrix counts once, as transformers counts."""
        return sum(prod(size) for size in self.tensors().values())


class _Keys:
    """Reads keys of a config, and remembers every bad one."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number up to MOST; 1 stands in for a bad one, which is remembered."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        most = MOST.get(key, MAX_CONTEXT)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
            return value
        large = isinstance(value, int) and value > most
        seen = "is missing" if value is None else f"is {str(value)[:80]}" if large else f"is {value!r}"
        needed = f"{most} at most is allowed" if large else "a positive whole number is needed"
        self.problems.append(f"{key} {seen}, {needed}")
        return 1

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        self.problems.append(f"{key} is {value!r}, a positive number is needed")
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{key} is {value!r}, true or false is needed")
        return bool(value)


def _rope(keys: _Keys, family: Family) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), `rope_theta` with `rope_scaling` (before)."""
    config = keys.config
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        keys.problems.append(f"rope_parameters is {parameters!r}, a table is needed")
        parameters = {}
    full = parameters.get("full_attention") or parameters
    local = parameters.get("sliding_attention") or {}
    theta = keys.number("rope_theta", family.theta)
    inner = _Keys(full)
    rope = Rope(
        theta=inner.number("rope_theta", theta),
        kind=str(full.get("rope_type") or full.get("type") or "default"),
        factor=inner.number("factor", 1.0),
        low_freq_factor=inner.number("low_freq_factor", 1.0),
        high_freq_factor=inner.number("high_freq_factor", 4.0),
        original_context=inner.size("original_max_position_embeddings", 8192),
        local_theta=(
            _Keys(local).number("rope_theta", keys.number("rope_local_base_freq", 10_000.0))
            if family.sandwich_norm
            else None
        ),
    )
    keys.problems += inner.problems
    return rope


def _windows(keys: _Keys, family: Family, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, by layer_types where given, else by each family's own older rule."""
    config = keys.config
    window = config.get("sliding_window", family.window)
    types = config.get("layer_types")
    if config.get("model_type") in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    if window is None or config.get("model_type") == "llama":
        return (None,) * layers
    if not isinstance(window, int) or window <= 0:
        keys.problems.append(f"sliding_window is {window!r}, a positive whole number or null is needed")
    if types is None and family.sandwich_norm:
        period = keys.size("sliding_window_pattern", 6)
        types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    elif types is None:
        # Qwen: the first layers see everything, 28 where the key is absent; Mistral: none.
        full = 0 if config.get("model_type") == "mistral" else config.get("max_window_layers", 28) or 0
        types = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if len(types) != layers:
        keys.problems.append(f"layer_types has {len(types)} entries, num_hidden_layers is {layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _biases(keys: _Keys, family: Family) -> tuple[str, ...]:
    """Which attention projections have a bias; Qwen2 has its own fixed set and Mistral none."""
    if family.biases or keys.config.get("model_type") == "mistral":
        return family.biases
    return ("q", "k", "v", "o") if keys.flag("attention_bias", False) else ()
