"""What this machine has and lacks: each finding with what it is for and how to get it.

Reads package metadata and asks programs for their versions. torch is asked in a process of its own, since
importing it takes seconds and can fail.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from foundation.rundir import memory_bytes, usable_cores
from samovar.show import size

MINIMAL_PYTHON = (3, 11)
MINIMAL_DISK_BYTES = 5_000_000_000

_TRAIN = "pip install 'samovar[train]' -c constraints.txt"
_BASE = "pip install samovar -c constraints.txt"
_UNSLOTH = "in an environment of its own: pip install 'samovar[unsloth]'"
_GPU = "install a torch built for your GPU (https://pytorch.org/get-started/locally), or go on without"

# package, needed for the quickstart?, what it is for, how to get it
_PACKAGES = (
    ("pydantic", True, "settings and recipes", _BASE),
    ("rich", True, "tables and progress bars", _BASE),
    ("numpy", True, "numbers", _BASE),
    ("safetensors", True, "weights on disk", _BASE),
    ("tokenizers", True, "text to tokens", _BASE),
    ("sentencepiece", True, "extending a vocabulary", _BASE),
    ("gguf", True, "writing GGUF files", _BASE),
    ("llama-cpp-python", True, "quantising and running GGUF files", _BASE),
    ("torch", True, "training", _TRAIN),
    ("transformers", True, "models and the training loop", _TRAIN),
    ("accelerate", True, "the training loop", _TRAIN),
    ("huggingface_hub", False, "inputs named by a hub id", _TRAIN),
    ("peft", False, "training with LoRA", _TRAIN),
    ("datasets", False, "corpora larger than memory", _TRAIN),
    ("unsloth", False, "faster training on an NVIDIA GPU", _UNSLOTH),
    ("bitsandbytes", False, "8-bit optimisers and 4-bit loading", _UNSLOTH),
    ("textual", False, "the terminal interface", "pip install 'samovar[tui]'"),
)

# any of these programs, needed?, what it is for, how to get it
_PROGRAMS = (
    (("c++", "g++", "clang++"), True, "building llama-cpp-python", "Debian: apt install build-essential"),
    (("cmake",), True, "building llama-cpp-python", "Debian: apt install cmake; or pip install cmake"),
    (("nvidia-smi",), False, "seeing an NVIDIA GPU", "the NVIDIA driver, if there is such a GPU"),
)

_ASK_TORCH = """
import json, torch
print(json.dumps({"cuda": torch.version.cuda or torch.version.hip, "mps": torch.backends.mps.is_available(),
    "gpus": [[p.name, p.total_memory] for p in map(torch.cuda.get_device_properties,
             range(torch.cuda.device_count()))]}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked for. `found` is what was seen, empty where it is missing."""

    name: str
    found: str
    needed: bool
    purpose: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.found) or not self.needed


def examine(folder: Path) -> list[Finding]:
    """Every finding; `folder` is where runs will be written. Changes nothing, and never raises."""
    return [*_machine(folder), *_programs(), *_packages(), _gpu()]


def _machine(folder: Path) -> Iterator[Finding]:
    version, new_enough = platform.python_version(), sys.version_info >= MINIMAL_PYTHON
    purpose, remedy = f"3.11 or newer; {version} is running", "install Python 3.11 or newer"
    yield Finding("python", version if new_enough else "", True, purpose, remedy)
    yield Finding("cores", str(usable_cores()), True, "stages side by side")
    yield Finding("memory", size(memory_bytes()), True, "models in memory")
    free = shutil.disk_usage(folder).free
    found = f"{size(free)} free" if free >= MINIMAL_DISK_BYTES else ""
    purpose = f"packages and the quickstart take {size(MINIMAL_DISK_BYTES)}; {size(free)} are free here"
    yield Finding("disk", found, True, purpose, "free some space, or run elsewhere")
    found = str(folder) if os.access(folder, os.W_OK) else ""
    yield Finding("folder", found, True, "runs/ is made here", "go to a folder that you may write")


def _programs() -> Iterator[Finding]:
    for names, needed, purpose, remedy in _PROGRAMS:
        path = next(filter(None, map(shutil.which, names)), "")
        yield Finding(names[0], path, needed, purpose, remedy)


def _packages() -> Iterator[Finding]:
    for package, needed, purpose, remedy in _PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = ""
        yield Finding(package, version, needed, purpose, remedy)


def _gpu() -> Finding:
    """What torch sees of GPUs."""
    purpose = "training real models; the quickstart does without"
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_TORCH], capture_output=True, text=True, timeout=120, check=True
        )
        said = json.loads(asked.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return Finding("gpu", "", False, purpose, _TRAIN)
    if said["mps"]:
        return Finding("gpu", "Apple GPU through Metal", False, purpose)
    names = ", ".join(f"{name} ({size(memory)})" for name, memory in said["gpus"])
    built = f"torch is built for {said['cuda']}" if said["cuda"] else "torch is built for the CPU"
    return Finding("gpu", f"{names}; {built}" if names else "", False, f"{purpose}; {built}", _GPU)
