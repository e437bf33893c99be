"""Loading models: what does not belong together is refused, never filled up with random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from foundation.errors import MissingError, ModelError
from foundation.model import context_tokens, create, load, save


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})  # type: ignore[operator]


def test_a_whole_model_loads_the_same_every_time(folder: Path) -> None:
    one, two = load(folder).state_dict(), load(folder).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert context_tokens(folder) == 128


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    change_config(folder, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"18 missing \(first: model\.layers\.3"):
        load(folder)


def test_weights_left_over_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match="9 not of this model"):
        load(folder)


def test_renamed_weights_are_refused(folder: Path) -> None:
    change_weights(folder, lambda w: {name.replace("q_proj", "queries"): value for name, value in w.items()})
    with pytest.raises(ModelError, match=r"missing .*, 3 not of this model"):
        load(folder)


def test_other_shapes_are_named(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    with pytest.raises(ModelError, match=r"9 of another shape \(first: model\.layers\.0\.mlp"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_damaged_files_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="can not load this model"):
        load(folder)


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="can not load this model"):
        load(folder)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_rows(folder: Path) -> None:
    tiny_tokenizer(folder, vocab_tokens=420)
    with pytest.raises(ModelError, match=r"the tokenizer has 41\d tokens, the embedding 400 rows"):
        load(folder)


def test_odd_configs(folder: Path) -> None:
    change_config(folder, hidden_size="32")
    with pytest.raises(ModelError, match="can not load this model"):
        load(folder)
    with pytest.raises(ModelError, match="can not be made of this shape"):
        create({"model_type": "no-such-model"}, 0)


def test_precisions(folder: Path, tmp_path: Path) -> None:
    exact = load(folder).state_dict()
    half = load(folder, precision="bf16").state_dict()
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)
    save(load(folder, precision="bf16"), folder, tmp_path / "half")
    assert {w.dtype for w in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert load(tmp_path / "half", precision="stored").dtype == torch.bfloat16
    assert load(folder, precision="stored").dtype == torch.float32
    again = load(tmp_path / "half")
    assert again.dtype == torch.float32 and not again.training


def test_four_bits_are_those_of_nf4(tmp_path: Path) -> None:
    """Against nf4 by hand: blocks of 64 numbers, each scaled by its largest, to the nearest of 16 levels."""
    from bitsandbytes.functional import dequantize_4bit

    levels = torch.tensor([
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ])  # fmt: skip
    folder = tiny_model(tmp_path, hidden_size=64, head_dim=16)
    model = load(folder, precision="nf4")
    weights = load_file(folder / "model.safetensors")
    linear = [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(linear) == 3 * 7
    for name, module in linear:
        blocks = weights[f"{name}.weight"].bfloat16().float().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
        expected = (levels[nearest] * scale).reshape(module.out_features, module.in_features)
        got = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        # The scales are quantised to 8 bits in turn, and the answer is in bf16.
        torch.testing.assert_close(got, expected, atol=0.02 * float(scale.max()), rtol=0.02)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_four_bits_without_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="precision = 'nf4' needs bitsandbytes"):
        load(folder, precision="nf4")


def test_four_bits_of_widths_that_come_back_wrong_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"q_proj is 32 wide; nf4 on a CPU takes multiples of 64"):
        load(folder, precision="nf4")


def test_four_bits_are_checked_like_all_others(folder: Path) -> None:
    change_config(folder, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"missing \(first: model\.layers\.3"):
        load(folder, precision="nf4")
