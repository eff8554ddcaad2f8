"""Weights by name through huggingface_hub's own code, from a cache made here; no network."""

from __future__ import annotations

import warnings
from dataclasses import replace

import published_layouts as published
import pytest
from huggingface_hub import constants

from eva_clip import build_encoder, build_model
from eva_clip import specs as registry
from eva_clip.hub import UnpinnedWeightsWarning, fetch_weights, file_sha256
from eva_clip.specs import HubFile, get_model_spec

REPO = "someone/tiny"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny, fabricate):
    """A hub cache with one file, and no way out."""
    root = tmp_path / "hub"
    folder = root / "models--someone--tiny"
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    fabricate(published.full_clip(tiny), "module").rename(folder / "snapshots" / REVISION / "weights.pt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / REVISION / "weights.pt"


def pinned(file: HubFile):
    return replace(get_model_spec("tiny-eva01"), hub=file)


@pytest.mark.parametrize("revision", [None, REVISION])
def test_cache_answers_offline_and_the_hash_is_checked(cache, revision):
    spec = pinned(HubFile(REPO, "weights.pt", revision, file_sha256(cache)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnpinnedWeightsWarning)
        assert fetch_weights(spec).read_bytes() == cache.read_bytes()


def test_builders_take_weights_by_name(cache, monkeypatch):
    spec = pinned(HubFile(REPO, "weights.pt", REVISION, file_sha256(cache)))
    monkeypatch.setitem(registry._REGISTRY, "tiny-eva01", spec)
    model, report = build_model("tiny-eva01", "pretrained")
    encoder, _ = build_encoder("tiny-eva01", "pretrained")
    assert report.source == str(cache)
    assert encoder.tower.pos_embed.equal(model.visual.pos_embed)


def test_other_content_is_refused(cache):
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected 0{64} for tiny-eva01"):
        fetch_weights(pinned(HubFile(REPO, "weights.pt", REVISION, "0" * 64)))


def test_unpinned_says_so(cache):
    with pytest.warns(UnpinnedWeightsWarning, match=r"someone/tiny/weights.pt: no published sha256 is known"):
        fetch_weights(pinned(HubFile(REPO, "weights.pt")))


def test_absent_offline_says_what_to_do(cache):
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set.*hf download someone/tiny other.pt"):
        fetch_weights(pinned(HubFile(REPO, "other.pt")))


def test_another_cache(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        fetch_weights(pinned(HubFile(REPO, "weights.pt")), cache_dir=tmp_path / "elsewhere")


def test_a_model_without_known_weights():
    with pytest.raises(ValueError, match="no weights are known for tiny-clip"):
        build_model("tiny-clip", "pretrained")


def test_embedded_weights_need_no_hub():
    assert fetch_weights(get_model_spec("nano")).is_file()
