"""Token ids equal open_clip's, and long texts are refused."""

from __future__ import annotations

import open_clip
import pytest
import torch

from eva_clip import tokenize

TEXTS = ["a diagram", "a dog", "a cat", "Ünïcödé & 日本語, 12:30!", ""]


def test_equal_to_open_clip():
    assert torch.equal(tokenize(TEXTS), open_clip.tokenize(TEXTS))
    assert tokenize("a dog").shape == (1, 77)
    assert tokenize("a dog", context_length=8).tolist() == [[49406, 320, 1929, 49407, 0, 0, 0, 0]]


def test_long_text_is_an_error_unless_truncated():
    fits, long = "dog " * 75, "dog " * 76
    assert tokenize(fits)[0, -1] == 49407
    with pytest.raises(ValueError, match=r"text 1 has 78 tokens and the context holds 77.*truncate=True"):
        tokenize(["a", long])
    assert torch.equal(tokenize(long, truncate=True), tokenize(fits))


def test_only_texts():
    with pytest.raises(TypeError, match="text 1 is a int"):
        tokenize(["a", 3])
