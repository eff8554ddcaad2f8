from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from eva_clip import build_classifier
from finetune.lora import adapters_of, check_adapters, inject_lora, merge_lora
from finetune.sections import TuneSection

NANO = "EVA01-CLIP-nano"


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return build_classifier(NANO, 5, pool="gap", checkpoint="pretrained")


def test_adapters_start_as_the_plain_model_and_every_one_acts(classifier):
    images = torch.randn(2, 3, classifier.spec.vision.image_size, classifier.spec.vision.image_size)
    plain = classifier.forward_features(images)
    inject_lora(classifier, TuneSection(what="lora", lora_rank=2))
    torch.testing.assert_close(classifier.forward_features(images), plain, atol=1e-5, rtol=1e-5)
    matrices = adapters_of(classifier)
    assert len(matrices) == 4 * len(classifier.tower.blocks)
    for parameter in matrices.values():
        with torch.no_grad():
            parameter.normal_(std=0.1)
        assert not torch.allclose(classifier.forward_features(images), plain, atol=1e-4)
        with torch.no_grad():
            parameter.zero_()


def test_the_published_trap_is_refused(classifier):
    """timm's forward past `qkv`, left as it is: the adapter would train and change nothing."""
    inject_lora(classifier, TuneSection(what="lora", lora_rank=2, lora_targets=["attn.qkv"]))
    for block in classifier.tower.blocks:
        block.attn.qkv_bias_separate = False
    with pytest.raises(ValueError, match=r"adapters do not act on the features, the first tower.blocks.0.attn.qkv"):
        check_adapters(classifier)


def test_merged_adapters_are_the_plain_model_with_other_weights(classifier):
    names = list(classifier.state_dict())
    original = copy.deepcopy(classifier.state_dict())
    inject_lora(classifier, TuneSection(what="lora", lora_rank=2))
    with torch.no_grad():
        for parameter in adapters_of(classifier).values():
            parameter.normal_(std=0.05)
    images = torch.randn(2, 3, classifier.spec.vision.image_size, classifier.spec.vision.image_size)
    adapted = classifier.forward_features(images)
    merge_lora(classifier)
    assert list(classifier.state_dict()) == names
    torch.testing.assert_close(classifier.forward_features(images), adapted, atol=1e-4, rtol=1e-4)
    changed = [name for name in names if not torch.equal(original[name], classifier.state_dict()[name])]
    assert len(changed) == 4 * len(classifier.tower.blocks)


def test_targets_that_match_nothing_are_named(classifier):
    with pytest.raises(ValueError, match=r"match no layer of EVA01-CLIP-nano; it has such as"):
        inject_lora(classifier, TuneSection(what="lora", lora_targets=["query"]))
