"""CLIP's byte-pair tokenizer (open_clip's vocabulary), with the length check that the original has."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


@functools.cache
def _byte_pair_encoder() -> object:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Texts to token ids, framed by start and end tokens and padded with 0.

    Args:
        texts: one text or several.
        context_length: tokens of a row, the two frame tokens included.
        truncate: cut longer texts (their last token is then the end token) instead of refusing them.

    Returns:
        int64 [len(texts), context_length].

    Raises:
        ValueError: a text is longer than `context_length` tokens and `truncate` is False.
        TypeError: something other than text.
    """
    encoder = _byte_pair_encoder()
    rows = [texts] if isinstance(texts, str) else list(texts)
    result = torch.zeros(len(rows), context_length, dtype=torch.long)
    for index, text in enumerate(rows):
        if not isinstance(text, str):
            raise TypeError(f"text {index} is a {type(text).__name__}; expected str")
        ids = [encoder.sot_token_id, *encoder.encode(text), encoder.eot_token_id]  # type: ignore[attr-defined]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(
                    f"text {index} has {len(ids)} tokens and the context holds {context_length}: {text[:60]!r}…; "
                    "shorten it or pass truncate=True"
                )
            ids = [*ids[: context_length - 1], ids[-1]]
        result[index, : len(ids)] = torch.tensor(ids)
    return result
