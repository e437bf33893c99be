"""Loading models: what does not belong together is refused, never filled up with random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from foundation.errors import ModelError
from foundation.model import context_tokens, create, load


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
