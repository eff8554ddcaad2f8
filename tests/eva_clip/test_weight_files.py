"""What is no weight file is refused, in words that say what to do, and nothing in it runs."""

from __future__ import annotations

import os
import pickle

import published_layouts as published
import pytest
import torch
from safetensors.torch import save_file

from eva_clip import load_checkpoint


class Bomb:
    """A pickle of this makes a file when it is loaded carelessly."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_refused_and_not_executed(tmp_path, tiny, fabricate):
    target = tmp_path / "executed"
    for path in (fabricate(published.encoder(tiny), "model", args=Bomb(str(target))), tmp_path / "bare.pt"):
        if path.name == "bare.pt":
            path.write_bytes(pickle.dumps(Bomb(str(target)), protocol=2))
        with pytest.raises(ValueError, match=r"refused and nothing in it was executed.*system.*safetensors"):
            load_checkpoint(path)
        path.write_bytes(pickle.dumps(Bomb(str(target)), protocol=4))
        with pytest.raises(ValueError, match="refused and nothing in it was executed"):
            load_checkpoint(path)
        assert not target.exists()


def test_other_harmless_classes_are_refused_too(tiny, fabricate):
    from pathlib import PurePosixPath

    path = fabricate(published.encoder(tiny), "model", args=PurePosixPath("x"))
    with pytest.raises(ValueError, match=r"refused.*PurePosixPath"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", r"web page of 31 bytes.*resolve"),
        (b"  <html><body>Access denied</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(200), "cut short"),
        (b"\x80\x02", "damaged"),
        (b"hello, these are no weights", "damaged"),
        ((10**6).to_bytes(8, "little") + b'{"a', "cut short or damaged"),
    ],
)
def test_not_weights(content, message, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_cut_downloads(tmp_path, tiny, fabricate):
    path = fabricate(published.encoder(tiny))
    whole = path.read_bytes()
    for part in (0.3, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ValueError, match="cut short"):
            load_checkpoint(path)
    safe = tmp_path / "weights.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 32)}, safe)
    safe.write_bytes(safe.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cut short"):
        load_checkpoint(safe)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*absent"):
        load_checkpoint(tmp_path / "absent.pt")


def test_nan_is_named(tmp_path, tiny):
    tensors = {key: torch.ones(shape) for key, shape in published.encoder(tiny).items()}
    tensors["blocks.1.mlp.fc2.weight"][3, 2] = float("nan")
    tensors["norm.bias"][0] = float("inf")
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"NaN or infinity in 2 of 32 tensors: blocks.1.mlp.fc2.weight, norm.bias"):
        load_checkpoint(path)


def test_safetensors_are_known_by_content(tmp_path, tiny, fabricate):
    path = fabricate(published.encoder(tiny)).rename(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"named .safetensors but does not begin like one.*rename"):
        load_checkpoint(path)
    tensors = {key: torch.ones(shape) for key, shape in published.encoder(tiny).items()}
    save_file(tensors, tmp_path / "weights.bin")
    assert load_checkpoint(tmp_path / "weights.bin").kind == "vision"


def test_no_tensors_and_no_layout(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no tensors: found epoch"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_checkpoint(path)
    torch.save({"layer1.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"no known layout \(the first: layer1.weight\)"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(ValueError, match="TorchScript program"):
        load_checkpoint(path)


def test_legacy_torch_format_is_read(tmp_path, tiny):
    tensors = {key: torch.ones(shape) for key, shape in published.encoder(tiny).items()}
    path = tmp_path / "weights.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(path).kind == "vision"
