"""The encoder that features come from: its hashes are remembered, so that stored features need no encoder built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eva_clip.encoder import FeatureDefinition, VisionEncoder, build_encoder
from eva_clip.hub import resolve_weights
from eva_clip.specs import add_model_config, get_model_spec
from probes.store import write_json
from probes.store_key import FORMAT

if TYPE_CHECKING:
    from eva_clip.spec_types import ModelSpec
    from probes.sections import ModelSection

WEIGHTS_FOLDER = "weights"
"""Inside the store: one small file for each weights file at each resolution and precision."""


class EncoderSource:
    """A recipe's encoder, built when it is needed and not before.

    Args:
        model: the recipe's section.
        precision: "fp32", "bf16" or "fp16".
        definition: the recipe's feature; only its mean-pool or projection demands matter here.
        cache: the store's folder, where hashes of weights files are remembered.
        seed: of weights that are randomly initialised.
        keep_projection: build with the projection, whatever the definition says.
        encoder: one that is built already.
    """

    def __init__(
        self,
        model: ModelSection,
        precision: str,
        definition: FeatureDefinition,
        *,
        cache: Path,
        seed: int = 0,
        keep_projection: bool = False,
        encoder: VisionEncoder | None = None,
    ) -> None:
        if model.config:
            add_model_config(model.config)
        spec = get_model_spec(model.name)
        self.spec: ModelSpec = spec.at_image_size(model.image_size) if model.image_size else spec
        self.model, self.precision, self.seed = model, precision, seed
        self.projected = definition.projected
        # One encoder serves all kinds: the definition that it is built by only says whether it keeps its projection.
        self.definition = FeatureDefinition("cls", projected=True) if keep_projection else definition
        if keep_projection and encoder is not None and not encoder.definition.projected:
            raise ValueError("projected features need an encoder that was built with projected=True")
        self._cache = cache
        self._encoder = encoder
        self._loaded = "an encoder that was given"
        self._facts: dict[str, str] | None = None

    def build(self) -> VisionEncoder:
        """The encoder; weights that are not in a file are drawn from the seed alone."""
        if self._encoder is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self._encoder, report = build_encoder(
                    self.model.name,
                    self.model.weights,
                    definition=self.definition,
                    image_size=self.model.image_size,
                    pos_embed=self.model.pos_embed,
                    precision=self.precision,
                )
            self._loaded = report.summary() if report else "none: randomly initialised"
        return self._encoder

    @property
    def body_sha256(self) -> str:
        """Hash of the tower without its projection."""
        return self._hashes()["body"]

    @property
    def sha256(self) -> str:
        """Hash of the tower as the recipe's definition has it, with the projection or without."""
        return self._hashes()["whole" if self.projected else "body"]

    @property
    def whole_sha256(self) -> str:
        """Hash of the tower with its projection."""
        return self._hashes()["whole"]

    @property
    def loaded(self) -> str:
        """What was loaded, in words."""
        return self._hashes()["loaded"]

    def _hashes(self) -> dict[str, str]:
        if self._facts is None:
            path = self._remembered()
            needed = {"body", "loaded"} | ({"whole"} if self.definition.projected else set())
            self._facts = _read_facts(path, needed)
            if self._facts is None:
                self._facts = self._compute()
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, self._facts)
        return self._facts

    def _compute(self) -> dict[str, str]:
        encoder = self.build()
        facts = {"body": encoder.weights_sha256(projection=False), "loaded": self._loaded}
        return facts | ({"whole": encoder.weights_sha256()} if self.definition.projected else {})

    def _remembered(self) -> Path | None:
        """Where the hashes of this weights file are remembered; None for weights that come from no file."""
        if self.model.weights in ("", "random") or self._encoder is not None:
            return None
        file = resolve_weights(self.spec, self.model.weights)
        if not file.is_file():
            return None
        status = file.stat()
        named: list[Any] = [FORMAT, str(file.resolve()), status.st_dev, status.st_ino, status.st_size]
        # No tool that replaces or edits a file can set its change time.
        named += [status.st_mtime_ns, status.st_ctime_ns, self.model.pos_embed, self.precision]
        named += [dataclasses.asdict(self.spec)]
        digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()
        return self._cache / WEIGHTS_FOLDER / f"{digest[:32]}.json"


def _read_facts(path: Path | None, needed: set[str]) -> dict[str, str] | None:
    """What is remembered, if it is whole."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and needed <= facts.keys() else None
