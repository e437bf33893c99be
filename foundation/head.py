"""The head of a language model, kept apart from its body, so that logits need never be held for a whole batch.

    hidden, head = hidden_of(model, batch)      # [B, T, D], and what turns D into V

The body runs through the model's own forward pass, so that DDP's reducer, PEFT, autocast and gradient
checkpointing see what they always see; only the head is given no position. foundation/chunked.py then reads
the head over chunks of positions.

    logits = cap * tanh(scale * (sum_f project_f(hidden) W_f^T + bias) / cap)

One factor is the plain head; LoRA on it is a second one (project = scaling * A, W = B), so no merged copy of
[V, D] is ever made. Scale and cap (Gemma's soft-cap, Cohere's and Granite's scales) are not read from the
config, where each family has its own name and two give one name opposite meanings (Granite divides by
logits_scaling, HyperCLOVA X multiplies): numbers are sent through in place of logits, and what comes out of
the model says what it does with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foundation.errors import ModelError

if TYPE_CHECKING:
    import torch

READ = ("input_ids", "attention_mask", "position_ids")
PROBES = (0.0, 1.0, -8.0, 1e6)  # in place of logits: an offset, the scale, the shape between, the cap
PROBE_ERROR = 1e-4  # relative: the probes go through in float32

Project = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits; see the formula at the top of this file."""

    factors: tuple[tuple[Project, torch.Tensor], ...]  # (hidden [..., D] -> [..., D_f], W_f [V, D_f])
    bias: torch.Tensor | None = None  # [V]
    scale: float = 1.0
    cap: float = math.inf
    operand: torch.dtype | None = None  # of the matrix products where autocast asks for one

    @property
    def vocab_tokens(self) -> int:
        """V."""
        return int(self.factors[0][1].shape[0])


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model reads of a batch. Packed rows have position_ids and no attention_mask."""
    return {name: batch[name] for name in READ if name in batch}


def hidden_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Head]:
    """The head's input [B, T, D] for a batch, without a KV cache, and the head; logits are not computed.

    `model` may be wrapped (DDP, PEFT). The returned tensors are part of the autograd graph. Raises ModelError
    when the head is no linear map, or the model does something to its logits that `Head` can not say.
    """
    import torch

    module = unwrapped(model).get_output_embeddings()
    if module is None:
        raise ModelError(f"{type(model).__name__} has no output embedding", hint="use a causal language model")
    kept: dict[str, Any] = {}

    def keep(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept["hidden"], kept["operand"] = args[0], _autocast(args[0].device.type)
        # No position, but the graph: DDP looks in the output for the parameters that will have gradients.
        return (args[0][:1, :0], *args[1:])

    def probe(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        numbers = torch.tensor(PROBES, dtype=torch.float32, device=output.device)
        return torch.cat([output, numbers[None, :, None].expand(1, -1, output.shape[-1])], 1)  # [1, 4, V]

    handles = [module.register_forward_pre_hook(keep), module.register_forward_hook(probe)]
    try:
        answered = model(**inputs_of(batch), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if "hidden" not in kept:
        raise ModelError(
            f"{type(model).__name__}: its forward pass does not call its output embedding",
            hint="a backend that replaces the forward pass must hand out hidden states itself",
        )
    scale, cap = _scale_and_cap(answered[0, :, 0].tolist())
    factors, bias = _factors(module)
    return kept["hidden"], Head(factors, bias, scale, cap, kept["operand"])


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel."""
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


def _autocast(device: str) -> torch.dtype | None:
    """The dtype in which autocast multiplies matrices here, None where it is off."""
    import torch

    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _scale_and_cap(answers: list[float]) -> tuple[float, float]:
    """(scale, cap) of f(z) = cap * tanh(scale * z / cap) or scale * z, from f at PROBES. Raises ModelError."""
    far = answers[-1]
    if math.isclose(far, PROBES[-1] * answers[1], rel_tol=PROBE_ERROR):
        scale, cap, guess = answers[1], math.inf, [answers[1] * z for z in PROBES]
    elif 0 < abs(answers[1]) < abs(far):
        cap = far
        scale = float(f"{cap * math.atanh(answers[1] / cap):.6g}")  # float32 gives seven digits
        guess = [cap * math.tanh(scale * z / cap) for z in PROBES]
    else:
        guess = []
    if not guess or any(abs(g - a) > PROBE_ERROR * abs(a) for g, a in zip(guess, answers, strict=True)):
        raise ModelError(
            f"the model turns logits {list(PROBES)} into {answers}, neither a scale nor a soft-cap",
            hint="this kind of model needs a line in foundation/head.py",
        )
    return scale, cap


def _factors(module: Any) -> tuple[tuple[tuple[Project, torch.Tensor], ...], torch.Tensor | None]:
    """(factors, bias) of a linear head: plain, with LoRA, or trained whole beside LoRA (modules_to_save)."""
    if hasattr(module, "modules_to_save"):
        off = module.disable_adapters or not module.active_adapters
        return _factors(module.original_module if off else module.modules_to_save[module.active_adapters[0]])
    if hasattr(module, "lora_A"):
        factors, bias = _factors(module.get_base_layer())
        active = [] if module.disable_adapters or module.merged else module.active_adapters
        return (*factors, *(_lora_factor(module, name) for name in active if name in module.lora_A)), bias
    weight = getattr(module, "weight", None)
    plain = weight is not None and weight.dim() == 2 and weight.is_floating_point()
    if not plain or hasattr(module, "token_adapter"):  # PEFT's trainable_token_indices
        raise ModelError(
            f"the head is a {type(module).__name__}, not a linear layer in floating point",
            hint="keep the head out of quantisation and of adapters other than plain LoRA",
        )
    return ((lambda hidden: hidden, weight),), getattr(module, "bias", None)


def _lora_factor(module: Any, name: str) -> tuple[Project, torch.Tensor]:
    """hidden -> scaling * A hidden, and B; dropout as the adapter has it."""
    down, up, drop, scaling = (
        part[name] for part in (module.lora_A, module.lora_B, module.lora_dropout, module.scaling)
    )
    if name in module.lora_variant or getattr(up, "bias", None) is not None:
        raise ModelError(
            f"adapter {name!r} on the head is not plain LoRA", hint="leave the head out of target_modules"
        )
    return lambda hidden: down(drop(hidden.to(down.weight.dtype))) * scaling, up.weight
