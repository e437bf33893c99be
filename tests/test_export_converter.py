"""Our GGUF files beside those of llama.cpp's own converter, for models that it knows: alike but for a list.

Tensors are compared for every family, in every type that both write, from checkpoints in bf16, f16 and f32;
there the tokenizer is a small SentencePiece model, which the converter takes in any family. Byte-level
tokenizers it knows by a hash of what they make of one fixed text, so real ones are needed: Llama 3's and
Qwen's are rebuilt from the vocabularies that lie beside llama.cpp's sources.

`DIFFERENCES` says what may differ, why, and where; each of its rows must be found wherever it holds.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import llamacpp
import numpy as np
import pytest
import spm
from handmade import CHAT_TEMPLATE, TEXTS, export, model_folder

from export.tokenizer.pretokenizers import LLAMA3, QWEN2
from export.tokenizer.vocabulary import NORMAL, UNUSED

NAME = "Tiny-Model-v1"
TYPES = ("f32", "f16", "bf16", "q8_0")
LLAMA3_ROPE = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 128, "num_hidden_layers": 7}
TIED = {"tie_word_embeddings": True}
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
README = """---
license: apache-2.0
license_link: LICENSE
language: [ru, en]
base_model: somebody/Tiny-Base
datasets: [somebody/stories]
---
# A model card
"""


@dataclass(frozen=True)
class Case:
    """A model, and the types in which both sides write it."""

    family: str
    tokenizer: Literal["spm", "gemma", "llama3", "qwen2"]
    dtype: str
    changes: dict[str, Any]
    types: Sequence[str] = TYPES


CASES = {
    "llama": Case("llama", "spm", "float32", {"attention_bias": True, "rope_parameters": LINEAR_ROPE}),
    "llama3": Case("llama", "spm", "bfloat16", {"rope_parameters": LLAMA3_ROPE} | TIED),
    "mistral": Case("mistral", "spm", "bfloat16", {"sliding_window": None}),
    "qwen2": Case("qwen2", "spm", "float16", {}),
    "qwen3": Case("qwen3", "spm", "bfloat16", TIED),
    "qwen3-odd": Case("qwen3", "spm", "bfloat16", {"intermediate_size": 152}),  # 4.75 blocks of Q8_0
    "gemma3": Case("gemma3_text", "gemma", "bfloat16", GEMMA | TIED),
    "llama3-bpe": Case("llama", "llama3", "bfloat16", TIED, ("bf16",)),
    "qwen2-bpe": Case("qwen2", "qwen2", "bfloat16", TIED, ("bf16",)),
}


@dataclass(frozen=True)
class Difference:
    """A key or tensor that differs, for a reason. `cases`: patterns of names in CASES."""

    cases: str
    seen: Literal["only ours", "only theirs", "values"]
    why: str
    holds: Callable[[Any, Any], bool] = lambda ours, theirs: True  # what is still asked of the two values


def last_bit(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool((np.abs(ours - theirs) <= np.spacing(theirs)).all())


def only_hidden(ours: list[Any], theirs: list[Any]) -> bool:
    """One entry differs: a padding row in the place of "</s>"."""
    found = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    return found in ([("[PAD128247]", "</s>")], [(UNUSED, NORMAL)])


HIDDEN = 'no text is cut so that "</s>" comes out, and llama.cpp would make an end token of it by its spelling'
SILENT = "what llama.cpp takes where the key is missing; we leave nothing to it"
DIFFERENCES: dict[str, Sequence[Difference]] = {
    "rope_freqs.weight": [
        Difference(
            "llama3",
            "values",
            "computed in float64 and rounded once; there, each step is rounded to float32",
            last_bit,
        )
    ],
    "*.vocab_size": [Difference("qwen* gemma3", "only ours", "the number of rows, told in every family")],
    "gemma3.attention.sliding_window_pattern": [
        Difference(
            "gemma3",
            "only ours",
            "a model that lost layers has no period; without the list llama.cpp assumes six",
        )
    ],
    "tokenizer.ggml.tokens": [Difference("qwen2-bpe", "values", HIDDEN, only_hidden)],
    "tokenizer.ggml.token_type": [Difference("qwen2-bpe", "values", HIDDEN, only_hidden)],
    "tokenizer.ggml.merges": [
        Difference(
            "qwen2-bpe", "values", HIDDEN, lambda ours, theirs: ours == [m for m in theirs if m != "</s >"]
        )
    ],
    "tokenizer.ggml.add_eos_token": [Difference("*", "only ours", SILENT, lambda ours, _: ours is False)],
    "tokenizer.ggml.add_bos_token": [
        Difference("qwen2-bpe", "only ours", SILENT, lambda ours, _: ours is False)
    ],
    "tokenizer.ggml.add_space_prefix": [
        Difference(
            "llama llama3 mistral qwen2 qwen3 qwen3-odd", "only ours", SILENT, lambda ours, _: ours is True
        ),
        Difference("*-bpe", "only ours", SILENT, lambda ours, _: ours is False),
    ],
    "tokenizer.ggml.bos_token_id": [
        Difference("qwen2-bpe", "only ours", "llama.cpp would take id 11; never written before a text")
    ],
}


@pytest.fixture(scope="session")
def source() -> Path:
    return llamacpp.sources()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_llama_cpps_converter(name: str, source: Path, tmp_path: Path) -> None:
    case = CASES[name]
    folder = model(case, source, tmp_path)
    theirs = llamacpp.convert(source, folder, tmp_path / "theirs", case.types, NAME)
    wanted = {
        (pattern, row.seen)
        for pattern, rows in DIFFERENCES.items()
        for row in rows
        if any(fnmatch.fnmatch(name, one) for one in row.cases.split())
    }
    for dtype in case.types:
        ours = export(folder, tmp_path / dtype, dtype=dtype, model_name=NAME)
        found, wrong = compare(name, contents(ours), contents(theirs[dtype]))
        assert wrong == [], (name, dtype)
        assert found == wanted, (name, dtype)


def contents(path: Path) -> dict[str, Any]:
    """All keys and tensors: name -> (type, shape or None, value)."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {
        name: (tuple(kind.name for kind in field.types), None, field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    return keys | {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.copy()) for t in reader.tensors}


def compare(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[set[tuple[str, str]], list[str]]:
    """(rows of DIFFERENCES that were met, everything else that differs) of a case."""
    found, wrong = set(), []
    for key in sorted(ours.keys() | theirs.keys()):
        one, two = ours.get(key), theirs.get(key)
        if one and two and one[:2] == two[:2] and np.array_equal(one[2], two[2]):
            continue
        seen = "only ours" if two is None else "only theirs" if one is None else "values"
        a, b = (side[2] if side else None for side in (one, two))
        for pattern, rows in DIFFERENCES.items():
            row = next((r for r in rows if any(fnmatch.fnmatch(name, c) for c in r.cases.split())), None)
            listed = row and row.seen == seen and fnmatch.fnmatch(key, pattern)
            if listed and row and (seen != "values" or one[:2] == two[:2]) and row.holds(a, b):
                found.add((pattern, seen))
                break
        else:
            types = f"{one and one[:2]} / {two and two[:2]}"
            wrong.append(f"{key}: {seen}, {types}: {str(a)[:200]} / {str(b)[:200]}")
    return found, wrong


def model(case: Case, source: Path, folder: Path) -> Path:
    """A Hugging Face folder with random weights and the case's tokenizer."""
    if case.tokenizer in ("spm", "gemma"):
        tokenizer, ids = sentencepiece(folder / "tokenizer", case.tokenizer == "gemma")
    else:
        tokenizer, ids = byte_level(folder / "tokenizer", source, case.tokenizer)
    out = model_folder(folder / NAME, case.family, dtype=case.dtype, **(ids | case.changes))
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)
    (out / "README.md").write_text(README)
    generation = json.loads((out / "generation_config.json").read_text()) | SAMPLING
    (out / "generation_config.json").write_text(json.dumps(generation))
    return out


Made = tuple[Path, dict[str, Any]]  # a tokenizer's folder, and what config.json says of it


def sentencepiece(folder: Path, gemma: bool) -> Made:
    """A trained tokenizer.model and its tokenizer.json, in Llama's form or in Gemma's."""
    spm.train(TEXTS * 30, folder, pieces=500, gemma=gemma)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    bos, eos, pad = (2, 1, 0) if gemma else (1, 2, None)
    rows = len(content["model"]["vocab"]) + 3  # three rows without a token
    return folder, {"vocab_size": rows, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def byte_level(folder: Path, source: Path, name: Literal["llama3", "qwen2"]) -> Made:
    """Llama 3's or Qwen's tokenizer, of the vocabulary that lies beside llama.cpp's sources."""
    import gguf
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    llama = name == "llama3"
    file = "ggml-vocab-llama-bpe.gguf" if llama else "ggml-vocab-qwen2.gguf"
    fields = gguf.GGUFReader(source / "models" / file).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    ids = {token: i for i, token in enumerate(tokens)}
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    vocab = {token: i for token, i in ids.items() if types[i] == gguf.TokenType.NORMAL}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=llama))
    split = pre_tokenizers.Split(Regex(LLAMA3 if llama else QWEN2), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    if llama:
        bos, eos, pad = "<|begin_of_text|>", "<|end_of_text|>", None
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    else:
        bos, eos, pad = None, "<|im_end|>", "<|endoftext|>"
        tokenizer.normalizer = normalizers.NFC()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos": bos, "eos": eos, "pad": pad}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{k}_token": v for k, v in named.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder, {"vocab_size": len(tokens)} | {f"{k}_token_id": ids.get(v) for k, v in named.items()}


def test_the_comparison_sees_every_kind_of_difference(tmp_path: Path) -> None:
    import gguf

    def made(name: str, **changes: Any) -> dict[str, Any]:
        values = {"count": np.uint32(3), "weight": np.ones((2, 32), np.float32), "extra": False} | changes
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        (writer.add_uint32 if isinstance(values["count"], np.uint32) else writer.add_uint64)(
            "a.count", int(values["count"])
        )
        writer.add_tensor("weight", values["weight"])
        if values["extra"]:
            writer.add_bool("extra", True)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return contents(tmp_path / name)

    plain = made("plain")
    assert compare("mistral", plain, made("again")) == (set(), [])
    one_bit = np.ones((2, 32), np.float32)
    one_bit[1, 31] = np.nextafter(np.float32(1), np.float32(2))
    for changes, key, word in (
        ({"weight": one_bit}, "weight", "values"),
        ({"weight": np.ones((2, 32), np.float16)}, "weight", "F16"),
        ({"weight": np.ones((32, 2), np.float32)}, "weight", "[32, 2]"),
        ({"count": np.uint32(4)}, "a.count", "values"),
        ({"count": np.uint64(3)}, "a.count", "UINT64"),
        ({"extra": True}, "extra", "only theirs"),
    ):
        found, wrong = compare("mistral", plain, made(f"{key}{word}", **changes))
        assert found == set() and len(wrong) == 1, changes
        assert wrong[0].startswith(f"{key}: ") and word in wrong[0]


def test_without_sources_tests_are_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMOVAR_LLAMA_CPP", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"holds no convert_hf_to_gguf\.py"):
        llamacpp.sources()
    monkeypatch.delenv("SAMOVAR_LLAMA_CPP")
    monkeypatch.setenv("SAMOVAR_NO_DOWNLOAD", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="SAMOVAR_NO_DOWNLOAD=1"):
        llamacpp.sources()


@pytest.mark.parametrize("name", ["../../evil", "link"])
def test_an_archive_writes_nowhere_else(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"llama_cpp_python-1/vendor/llama.cpp/{name}")
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(member)
    with pytest.raises(tarfile.FilterError):
        llamacpp.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "evil").exists()
