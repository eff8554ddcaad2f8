"""Images or videos in WebDataset tar shards. No torch."""

from __future__ import annotations

import gzip
import io
import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from probes.sections import RecipeError
from probes.source_contract import EXPECTED, EXTENSIONS, Samples, is_media, short_names, some

TAR_BLOCK = 512


COMPRESSED_LIMIT = 2**30
"""Largest compressed tar in bytes; it is held in memory whole, because gzip cannot be read by offset."""


UNPACKED_LIMIT = 2**33
"""Largest content of a compressed tar in bytes."""


class TarSource(Samples):
    """WebDataset shards; a sample is the members that share the path up to the first dot of the base name.

    The image's (or video's) extension is one of `EXTENSIONS`; the label is `.cls` (text, or an integer), or `label`
    of `.json`; the caption is `caption` of `.json`, or `.txt`. A member `classes.txt` (one name a line) names
    integer labels; without it an integer's digits are the class name. `.tar` is indexed once, read by offset;
    `.tar.gz` and `.tgz` are held in memory unpacked.

    Args:
        paths: the shards.
        media: "image" or "video", the kind of members that are read.

    Raises:
        RecipeError: a shard is damaged or too large, a member climbs out, or a sample lacks image or label.
    """

    def __init__(self, paths: Sequence[str | Path], media: str = "image") -> None:
        super().__init__([str(path) for path in paths], media)
        self.captions: list[str | None] = []
        self._places: list[tuple[int, int, int]] = []  # shard, offset, size
        self._names = short_names(self.paths)
        self._unpacked = [_unpack(path) if path.endswith("gz") else None for path in self.paths]
        self._times = [Path(path).stat().st_mtime_ns for path in self.paths]
        problems: list[str] = []
        class_names: list[str] | None = None
        for shard, name in enumerate(self._names):
            content = self._unpacked[shard]
            with io.BytesIO(content) if content is not None else Path(self.paths[shard]).open("rb") as stream:
                members = _index_members(stream, self.paths[shard], media)
                listed = _class_names(stream, members)
                if listed and class_names and listed != class_names:
                    problems.append(f"{name} has another classes.txt than an earlier shard")
                class_names = listed or class_names
                for key, parts in _group_members(members).items():
                    self._add(stream, shard, f"{name}/{key}", parts, problems)
        if class_names is not None:
            self._name_labels(class_names, problems)
        if problems:
            raise RecipeError(f"{len(problems)} wrong sample(s): {some(problems)}; correct the shards")
        if not self.keys:
            raise RecipeError(f"{some(self.paths)} holds no samples; expected {EXPECTED['tar']}")

    def _add(
        self, stream: BinaryIO, shard: int, key: str, parts: dict[str, tuple[int, int]], problems: list[str]
    ) -> None:
        """Append one sample, or say what is wrong with it."""
        images = [extension for extension in parts if extension.lower() in EXTENSIONS[self.media]]
        texts = {
            extension.lower(): _read_at(stream, *place)
            for extension, place in parts.items()
            if extension.lower() in ("cls", "json", "txt")
        }
        if not images and not texts:
            return
        try:
            label, caption = _label_and_caption(texts)
        except ValueError as error:
            problems.append(f"{key} has an unreadable label or caption ({error})")
            return
        if len(images) != 1:
            problems.append(f"{key} has {len(images) or 'no'} {self.media}(s) among {', '.join(sorted(parts))}")
        elif not label:
            problems.append(f"{key} has no label (.cls, or `label` in .json) among {', '.join(sorted(parts))}")
        else:
            self.keys.append(f"{key}.{images[0]}")
            self.labels.append(label)
            self.captions.append(caption)
            self._places.append((shard, *parts[images[0]]))

    def _name_labels(self, class_names: list[str], problems: list[str]) -> None:
        for index, label in enumerate(self.labels):
            if label.isdecimal() and int(label) < len(class_names):
                self.labels[index] = class_names[int(label)]
            elif label.isdecimal():
                problems.append(f"{self.keys[index]} has label {label}; classes.txt names {len(class_names)} classes")

    def read(self, index: int) -> bytes:
        """The encoded image or video.

        Raises:
            RecipeError: the shard became shorter since it was indexed.
        """
        shard, offset, size = self._places[index]
        content = self._unpacked[shard]
        if content is not None:
            return content[offset : offset + size]
        # Opened at each read: a handle kept over a fork would share its position with the other workers.
        with Path(self.paths[shard]).open("rb") as stream:
            data = _read_at(stream, offset, size)
        if len(data) != size:
            raise RecipeError(f"{self.paths[shard]} became shorter while in use; start again")
        return data

    def caption(self, index: int) -> str | None:
        """Content of the sample's `.txt`, or `caption` of its `.json`."""
        return self.captions[index]

    def location(self, index: int) -> str:
        """Path of the shard, and the member."""
        shard = self._places[index][0]
        return f"{self.paths[shard]}: {self.keys[index].removeprefix(self._names[shard] + '/')}"

    def stamp(self, index: int) -> tuple[int, int]:
        """Size of the member in bytes and modification time of its shard in nanoseconds."""
        shard, _, size = self._places[index]
        return size, self._times[shard]


def _unpack(path: str) -> bytes:
    size = Path(path).stat().st_size
    remedy = f"decompress it (gunzip {path}) and name the .tar"
    if size > COMPRESSED_LIMIT:
        raise RecipeError(f"{path} is {size / 2**30:.1f} GiB compressed, too much to hold in memory; {remedy}")
    try:
        with gzip.open(path) as stream:
            content = stream.read(UNPACKED_LIMIT + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecipeError(f"{path} is truncated or damaged ({error}); copy or build it again") from error
    if len(content) > UNPACKED_LIMIT:
        raise RecipeError(f"{path} unpacks to more than {UNPACKED_LIMIT / 2**30:.0f} GiB; {remedy}")
    return content


def _index_members(stream: BinaryIO, path: str, media: str) -> dict[str, tuple[int, int]]:
    """Name -> (offset, size) of each file of an uncompressed tar; links stand for their targets."""
    members: dict[str, tuple[int, int]] = {}
    links = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = _inside(member.name, member.name, path)
                if name in members or name in links:
                    raise RecipeError(f"{path} has two members {name}; build it again")
                if member.issym() or member.islnk():
                    folder = posixpath.dirname(name) if member.issym() else ""
                    links[name] = _inside(posixpath.join(folder, member.linkname), member.name, path)
                elif member.isreg():
                    members[name] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise RecipeError(f"{path} is truncated or no tar file ({error}); copy or build it again") from error
    stream.seek(end)
    # tarfile takes a file cut inside a header for complete; a complete one ends in zeros.
    if stream.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise RecipeError(f"{path} is truncated or damaged at byte {end}; copy or build it again")
    for name, target in links.items():
        if target in members:
            members[name] = members[target]
        elif is_media(posixpath.basename(name), media):
            raise RecipeError(f"{path}: member {name} links to {target}, which is not in it; build it again")
    return members


def _inside(target: str, member: str, path: str) -> str:
    """The normal form of a path inside the archive."""
    name = posixpath.normpath(target.replace("\\", "/"))
    if name.startswith(("/", "../")) or name == ".." or re.match("[A-Za-z]:", name):
        raise RecipeError(f"{path}: member {member} climbs out of the archive ({target}); do not trust this file")
    return name


def _group_members(members: dict[str, tuple[int, int]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Sample key -> extension -> place, sorted; hidden files and `classes.txt` belong to no sample."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name in sorted(members):
        folder, base = posixpath.split(name)
        stem, dot, extension = base.partition(".")
        if stem and dot and base != "classes.txt":
            groups.setdefault(posixpath.join(folder, stem), {})[extension] = members[name]
    return groups


def _class_names(stream: BinaryIO, members: dict[str, tuple[int, int]]) -> list[str] | None:
    place = members.get("classes.txt")
    if place is None:
        return None
    return [line.strip() for line in _read_at(stream, *place).decode("utf-8-sig").splitlines()]


def _label_and_caption(texts: dict[str, bytes]) -> tuple[str | None, str | None]:
    """Label and caption of a sample from its `.cls`, `.json` and `.txt`; None where absent."""
    record = json.loads(texts.get("json", b"{}"))
    if not isinstance(record, dict):
        raise ValueError(f".json holds a {type(record).__name__}")
    label, caption = record.get("label"), record.get("caption")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise ValueError(f"label is {label!r}")
    if "cls" in texts:
        label = texts["cls"].decode("utf-8-sig")
    if caption is None and "txt" in texts:
        caption = texts["txt"].decode("utf-8-sig").strip()
    return (None if label is None else str(label).strip()), caption


def _read_at(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)
