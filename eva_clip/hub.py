"""Weights by name: from this package, or from the Hugging Face hub and its cache."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from eva_clip.spec_types import HubFile, ModelSpec


class UnpinnedWeightsWarning(UserWarning):
    """The table has no digest for a file, so that its content could not be verified."""


def resolve_weights(spec: ModelSpec, weights: str | Path) -> Path:
    """The file that "pretrained" (`fetch_weights`) or a path names."""
    return fetch_weights(spec) if str(weights) == "pretrained" else Path(weights)


def fetch_weights(spec: ModelSpec, cache_dir: str | Path | None = None) -> Path:
    """The file of a model's published weights, downloaded if the cache has it not.

    A download that was cut off resumes. Without a network, or with HF_HUB_OFFLINE=1, the cache alone answers.

    Args:
        spec: the model.
        cache_dir: another cache than huggingface_hub's own.

    Raises:
        ValueError: no weights are known for the model, or the file has another sha256 than the table.
        FileNotFoundError: it is not in the cache and could not be downloaded.
    """
    if spec.weights_path is not None:
        return spec.weights_path
    if spec.hub is None:
        raise ValueError(f"no weights are known for {spec.name}; name a checkpoint file instead")
    path = _download(spec.hub, cache_dir)
    if spec.hub.sha256 is None:
        warnings.warn(
            f"{spec.hub.repo}/{spec.hub.filename}: no published sha256 is known, so its content is not verified "
            f"(found {path})",
            UnpinnedWeightsWarning,
            stacklevel=2,
        )
        return path
    digest = file_sha256(path)
    if digest != spec.hub.sha256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {spec.hub.sha256} for {spec.name}: it is damaged or not the "
            "published file; delete it and let it be downloaded again"
        )
    return path


def _download(file: HubFile, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    address = f"{file.repo}/{file.filename}" + (f" at {file.revision}" if file.revision else "")
    try:
        return Path(hf_hub_download(file.repo, file.filename, revision=file.revision, cache_dir=cache_dir))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}"
        raise FileNotFoundError(
            f"{address} is not in the cache {cache_dir or constants.HF_HUB_CACHE} and could not be downloaded "
            f"({offline}); download it where there is a network (`hf download {file.repo} {file.filename}`) and copy "
            "that cache, or pass the path of a file"
        ) from error


def file_sha256(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
