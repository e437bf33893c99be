"""prune.cut: a cut checkpoint is the original with layers that do nothing, in every family, on disk."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import model_folder

from foundation.errors import ModelError, StopRequested
from foundation.files import sha256_file
from foundation.model import load
from foundation.report import Silent
from foundation.shape import ModelShape
from foundation.tensors import TensorFiles
from prune.cut import Settings, cut_config, cut_folder, run
from prune.kept import Kept, identity, kept_layers, write_kept

WINDOW = 48  # tokens; the inputs below are longer
LLAMA3 = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", QWEN_WINDOW),
    "qwen3-window": ("qwen3", QWEN_WINDOW | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-untied-bf16": ("gemma3_text", GEMMA | {"dtype": "bfloat16"}),
}
OLD_STYLE = ("qwen2-window", "qwen3-window", "gemma3")  # given without layer_types, as older files are


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, cut into shards; what slides is told by position where old files do so."""
    kind, changes = FAMILIES[request.param]
    made = model_folder(
        tmp_path_factory.mktemp("model"), kind, **({"num_hidden_layers": 7, "shards": "200KB"} | changes)
    )
    if request.param in OLD_STYLE:
        change(made, lambda config: config.pop("layer_types"))
    if request.param == "gemma3":
        change(made, lambda config: config.update(sliding_window_pattern=3))
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("llama"), num_hidden_layers=4, hidden_size=32)


def change(folder: Path, by: Any, name: str = "config.json") -> Path:
    value = json.loads((folder / name).read_text())
    by(value)
    (folder / name).write_text(json.dumps(value))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path, idle: tuple[int, ...] = ()) -> torch.Tensor:
    """Of the model with the layers `idle` passing on what they get: every other layer stays in its place."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    for layer in idle:
        model.model.layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 600, (2, 3 * WINDOW)))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("gone", [(2, 5), (0, 1, 6)])
def test_it_computes_what_the_original_computes_around_idle_layers(
    folder: Path, gone: tuple[int, ...], tmp_path: Path
) -> None:
    kept = cut_folder(folder, gone, tmp_path / "cut", shard_bytes=150_000)
    assert kept.kept == tuple(i for i in range(7) if i not in gone)
    torch.testing.assert_close(logits(tmp_path / "cut"), logits(folder, gone), rtol=0, atol=0)
    assert load(tmp_path / "cut").config.num_hidden_layers == 7 - len(gone)
    before, after = TensorFiles(folder), TensorFiles(tmp_path / "cut")
    assert {after.dtype(name) for name in after} == {before.dtype(name) for name in before}
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1


def test_windows_go_with_their_layers() -> None:
    """By hand: a Gemma of period 3 sees everything in layers 2 and 5; a Qwen in its first three."""
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window_pattern": 3}
    cut = cut_config(gemma, [0, 2, 5, 6])
    assert cut["layer_types"] == [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding")]
    assert "sliding_window_pattern" not in cut and cut["num_hidden_layers"] == 4
    assert cut_config(gemma | {"sliding_window_pattern": None}, [5, 6])["layer_types"][0] == "full_attention"
    qwen = {"model_type": "qwen3", "num_hidden_layers": 7} | QWEN_WINDOW
    cut = cut_config(qwen, [0, 2, 5, 6])
    assert cut["layer_types"] == [f"{kind}_attention" for kind in ("full", "full", "sliding", "sliding")]
    assert cut["max_window_layers"] == 2
    del qwen["max_window_layers"]  # 28, so nothing slides
    assert set(cut_config(qwen, [0, 5])["layer_types"]) == {"full_attention"}
    plain = {"model_type": "qwen2", "num_hidden_layers": 7, "max_window_layers": 7}
    assert cut_config(plain, [0, 5]) == plain | {"num_hidden_layers": 2, "max_window_layers": 2}


def test_rotary_bases_by_kind_of_layer_stay(tmp_path: Path) -> None:
    """Also when no layer of a kind is left, of which transformers still wants the base."""
    source = model_folder(tmp_path / "m", "gemma3_text", **(GEMMA | {"num_hidden_layers": 7}))
    for number, gone in enumerate(
        [(5,), (0, 1, 2, 3, 4, 6)]
    ):  # the only layer that sees everything; all others
        cut_folder(source, gone, tmp_path / str(number))
        assert config_of(tmp_path / str(number))["rope_parameters"] == config_of(source)["rope_parameters"]
        torch.testing.assert_close(logits(tmp_path / str(number)), logits(source, gone), rtol=0, atol=0)


def test_lists_that_are_as_long_by_chance_stay_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "m", num_hidden_layers=2)
    change(source, lambda config: config.update(eos_token_id=[1, 106]))
    cut_folder(source, [0], tmp_path / "cut")
    assert config_of(tmp_path / "cut")["eos_token_id"] == [1, 106]
    change(source, lambda config: config.update(no_rope_layers=[0, 1], short=[1]))
    with pytest.raises(ModelError, match=r"lists no_rope_layers with 2 entries, as many"):
        cut_folder(source, [0], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_stands_beside_the_weights_comes_along(llama: Path, tmp_path: Path) -> None:
    cut_folder(llama, [1], tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (llama / name).read_bytes()
    same = {"num_hidden_layers": 3}
    assert config_of(tmp_path) == config_of(llama) | same


def test_the_same_bytes_however_it_is_cut(folder: Path, tmp_path: Path) -> None:
    """Twice the same; and one layer after another is as both at once, whatever the order."""
    cut_folder(folder, [2, 5], tmp_path / "once")
    cut_folder(folder, [5, 2], tmp_path / "again")
    cut_folder(folder, [2], tmp_path / "first")
    cut_folder(tmp_path / "first", [4], tmp_path / "one after another")
    cut_folder(folder, [5], tmp_path / "last")
    cut_folder(tmp_path / "last", [2], tmp_path / "the other way")
    wanted = digests(tmp_path / "once")
    assert set(wanted) > {"model.safetensors", "config.json", "pruning.json"}
    for name in ("again", "one after another", "the other way"):
        assert digests(tmp_path / name) == wanted


def test_one_shard_is_held_at_most(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in bytes of tensors alive at once; every one is read once, and of the cut layers none."""
    read, alive, peak, names = TensorFiles.read, [0], [0], []

    def counting(self: TensorFiles, name: str) -> torch.Tensor:
        tensor = read(self, name).clone()
        names.append(name)
        size = tensor.nbytes
        alive[0] += size
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counting)
    total = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    largest = 640 * 32 * 4  # the embedding
    cut_folder(llama, [1], tmp_path, shard_bytes=50_000)
    assert largest <= peak[0] <= 50_000 + 2 * largest < 0.6 * total
    assert alive[0] == 0
    assert len(names) == len(set(names)) == len(TensorFiles(tmp_path))
    assert not [name for name in names if ".layers.1." in name]


def test_a_kill_leaves_nothing_that_looks_whole(llama: Path, tmp_path: Path) -> None:
    class Killed(Silent):
        left = 7

        def progress(self, *_: Any, **__: Any) -> None:
            self.left -= 1

        def stop_requested(self) -> bool:
            return self.left <= 0

    cut_folder(llama, [1], tmp_path / "whole", shard_bytes=50_000)
    cut_folder(llama, [2], tmp_path / "out")  # an older one stands there
    with pytest.raises(StopRequested):
        cut_folder(llama, [1], tmp_path / "out", report=Killed(), shard_bytes=50_000)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path / "out")
    cut_folder(llama, [1], tmp_path / "out", shard_bytes=50_000)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_map_is_composed_and_read_back(llama: Path, tmp_path: Path) -> None:
    whole = kept_layers(llama)
    assert whole == Kept(4, (0, 1, 2, 3), identity(llama)) and whole.removed == ()
    assert cut_folder(llama, [1], tmp_path / "a") == kept_layers(tmp_path / "a")
    twice = cut_folder(tmp_path / "a", [1], tmp_path / "b")  # layer 2 of the original
    assert twice == kept_layers(tmp_path / "b") == Kept(4, (0, 3), identity(llama))
    assert twice.removed == (1, 2)
    assert json.loads((tmp_path / "b" / "pruning.json").read_text()) == {
        "format": 1,
        "kept": [0, 3],
        "original": identity(llama),
        "original_layers": 4,
    }


def test_identity_tells_models_apart(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert identity(copy) == identity(llama)
    change(copy, lambda config: config.update(rms_norm_eps=1e-4))
    assert identity(copy) != identity(llama)
    assert identity(
        model_folder(tmp_path / "m", num_hidden_layers=4, hidden_size=32, dtype="bfloat16")
    ) not in (
        identity(llama),
        identity(copy),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": [0, 3, 2]}, r"must rise, seen \[0, 3, 2\]"),
        ({"kept": [0, 2, 2]}, "must rise"),
        ({"kept": [0, 2, 4]}, r"not all in 0\.\.3"),
        ({"kept": [-1, 2, 3]}, r"not all in 0\.\.3"),
        ({"kept": [0, 3]}, "names 2 layers, config.json has num_hidden_layers 3"),
        ({"kept": [0, 2, 3.0]}, "no whole number"),
        ({"kept": [False, 2, 3]}, "no whole number"),
        ({"kept": None}, "can not be read"),
        ({"original": 7}, "original is no text"),
        ({"original_layers": "4"}, "no whole number"),
        ({"format": 2}, "format is 2, 1 is known"),
    ],
)
def test_a_map_that_can_not_be_is_refused(
    llama: Path, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    cut_folder(llama, [1], tmp_path)
    change(tmp_path, lambda value: value.update(changes), "pruning.json")
    with pytest.raises(ModelError, match=words):
        kept_layers(tmp_path)
    with pytest.raises(ModelError, match=words):
        cut_folder(tmp_path, [0], tmp_path / "again")


def test_a_map_that_is_no_json_is_refused(llama: Path, tmp_path: Path) -> None:
    cut_folder(llama, [1], tmp_path)
    (tmp_path / "pruning.json").write_text("[")
    with pytest.raises(ModelError, match="can not be read"):
        kept_layers(tmp_path)
    write_kept(tmp_path, Kept(4, (0, 2, 3), "x"))
    assert kept_layers(tmp_path).original == "x"


def test_lists_of_wrong_length_are_refused_with_the_numbers(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "m", "qwen3", num_hidden_layers=4)
    change(source, lambda config: config.update(layer_types=["full_attention"] * 5))
    for read in (kept_layers, lambda folder: cut_folder(folder, [0], tmp_path / "out")):
        with pytest.raises(ModelError, match="layer_types has 5 entries, num_hidden_layers is 4"):
            read(source)
    change(source, lambda config: config.update(layer_types="full_attention"))
    with pytest.raises(ModelError, match="layer_types has 'full_attention'"):
        kept_layers(source)
    change(source, lambda config: config.update(num_hidden_layers=None))
    with pytest.raises(ModelError, match="num_hidden_layers is None"):
        kept_layers(source)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([4], r"has no layer 4; it has 0\.\.3"),
        ([-1, 1], r"has no layer -1; it has 0\.\.3"),
        ([1, 2, 1], "named twice: 1"),
        ([0, 1, 2, 3], "has 4 layers, and all would go"),
    ],
)
def test_layers_that_can_not_go_are_named(llama: Path, layers: list[int], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        cut_folder(llama, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "gemma3n_text"},
            "no layers can be cut from gemma3n_text: layers share keys and values",
        ),
        ({"model_type": "gemma3n"}, "no layers can be cut from gemma3n: layers share"),
        ({"model_type": "gemma3"}, r"gemma3: it reads images(.|\n)*take the text model"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported; supported: llama, mistral"),
        ({"quantization_config": {"quant_method": "awq"}}, "a quantised checkpoint can not be cut"),
        ({"num_hidden_layers": 3}, r"unknown model\.layers\.3\."),
        ({"num_hidden_layers": 5}, r"missing model\.layers\.4\."),
        ({"vocab_size": 641}, r"model\.embed_tokens\.weight is \(640, 32\), config\.json says \(641, 32\)"),
    ],
)
def test_models_that_can_not_be_cut_are_refused(
    llama: Path, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(llama, tmp_path / "m")
    change(copy, lambda config: config.update(changes))
    with pytest.raises(ModelError, match=words) as caught:
        cut_folder(copy, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if "gemma" in str(changes):
        assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("model.layers.2.mlp.down_proj.weight", torch.int8, r"down_proj\.weight is I8, cut are F64"),
        ("model.layers.2.per_layer_gate.weight", torch.float32, r"unknown model\.layers\.2\.per_layer_gate"),
        ("visual.layers.2.norm.weight", torch.float32, r"unknown visual\.layers\.2"),
    ],
)
def test_tensors_that_are_not_known_are_refused(
    llama: Path, name: str, dtype: torch.dtype, words: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(llama, tmp_path / "m")
    weights = load_file(copy / "model.safetensors")
    weights[name] = torch.zeros(weights.get(name, torch.zeros(3)).shape, dtype=dtype)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        cut_folder(copy, [0], tmp_path / "out")


def test_old_rotary_buffers_go_and_a_stored_tied_head_stays(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = model_folder(tmp_path / "m", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(12) for i in range(3)}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    cut_folder(source, [0], tmp_path / "cut")
    names = list(TensorFiles(tmp_path / "cut"))
    assert "lm_head.weight" in names and not [name for name in names if "inv_freq" in name]
    load(tmp_path / "cut")


def test_a_model_is_not_cut_onto_itself(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "m")
    with pytest.raises(ModelError, match="overwritten by its own cut"):
        cut_folder(copy, [0], tmp_path / "m" / ".." / "m")
    assert digests(copy) == digests(llama)


def test_the_stage(llama: Path, tmp_path: Path) -> None:
    settings = Settings.model_validate_json('{"layers": [0, 2]}')
    figures = run(settings, {"model": llama}, tmp_path, Silent())
    shape = ModelShape.from_folder(llama)
    layer = sum(int(np.prod(s)) for name, s in shape.tensors().items() if ".layers.0." in name)
    assert figures == {
        "layers": 2,
        "original_layers": 4,
        "removed": "0, 2",
        "parameters": shape.parameters() - 2 * layer,
    }
    assert kept_layers(tmp_path / "model").kept == (1, 3)
    with pytest.raises(ValueError, match="layers"):
        Settings.model_validate_json('{"layers": []}')
