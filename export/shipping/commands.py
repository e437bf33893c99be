"""How to serve a bundle: command lines of llama.cpp, Ollama and Samovar, as lists of arguments.

They are run in the bundle's folder. Flags are those of llama.cpp's common/arg.cpp; what is not said there
stays at llama.cpp's default. One conversation of a moderate context is served: a model's whole context can
take more memory than its weights, and the card's memory table says what fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONTEXT_TOKENS = 8192  # of one conversation, where the model has more
FLAGS = {  # key in generation.json -> llama.cpp's flag
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
    "max_new_tokens": "--predict",
}


def context_served(trained_tokens: int) -> int:
    """Tokens of context that the commands and the Modelfile ask for."""
    return min(trained_tokens, CONTEXT_TOKENS)


def commands(
    name: str, path: str, trained_tokens: int, generation: Mapping[str, Any], adapters: Sequence[str]
) -> dict[str, list[str]]:
    """What to run, by program. `path` and `adapters` are paths inside the bundle."""
    common = ["--model", path, "--ctx-size", str(context_served(trained_tokens))]
    sampling = [
        word for key, flag in FLAGS.items() if key in generation for word in (flag, str(generation[key]))
    ]
    # Loaded and left off: a request names the one it wants. --lora-init-without-apply promises that too, but a
    # request that names none then gets them all.
    loras = ["--lora-scaled", ",".join(f"{path}:0" for path in adapters)] if adapters else []
    return {
        "samovar": ["samovar", "chat", "."],
        "llama-cli": ["llama-cli", *common, *sampling],
        "llama-server": ["llama-server", *common, "--parallel", "1", "--alias", name, *sampling, *loras],
        "ollama": ["ollama", "create", name.lower(), "--file", "Modelfile"],
    }
