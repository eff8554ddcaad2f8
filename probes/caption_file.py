"""Caption files: which captions belong to which image, in the formats that published sets come in. No torch."""

from __future__ import annotations

import csv
import json
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probes.sections import RecipeError
from probes.source_contract import some

Captions = dict[str, list[str]]
"""Image path, relative to the folder of images, to its captions; both in the file's order."""
EXPECTED = (
    "expected one of\n"
    '  Karpathy\'s splits: {"images": [{"filename": path, "split": name, "sentences": [{"raw": text}]}]}\n'
    '  COCO\'s annotations: {"images": [{"id": 1, "file_name": path}], "annotations": '
    '[{"image_id": 1, "caption": text}]}\n'
    '  a list, or JSON lines: {"image": path, "caption": text or list of texts}\n'
    "  a CSV file with the columns path,caption"
)


def load_captions(path: str | Path, split: str) -> Captions:
    """Read a caption file; its kind is told by the content (CSV and plain `.txt` by the name).

    Args:
        path: the file, UTF-8.
        split: images to take where the file gives each a split.

    Raises:
        RecipeError: it cannot be read, is of no known kind, or entries are wrong (counted, the first few named).
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"captions.file: nothing at {path}; {EXPECTED}")
    problems: list[str] = []
    try:
        if path.suffix.lower() in (".csv", ".txt"):
            captions = _from_rows(path, split, problems)
        else:
            captions = _from_json(path, _read_json(path), split, problems)
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"captions.file: {path} cannot be read ({error}); save it as UTF-8") from error
    problems += [f"{image} has no caption" for image, texts in captions.items() if not texts]
    problems += [
        f"{image} has an empty caption" for image, texts in captions.items() if any(not text.strip() for text in texts)
    ]
    if problems:
        raise RecipeError(f"captions.file: {path} has {len(problems)} mistake(s): {some(problems)}; correct them")
    if not captions:
        raise RecipeError(f"captions.file: {path} names no image; {EXPECTED}")
    return {image: [text.strip() for text in texts] for image, texts in captions.items()}


def _read_json(path: Path) -> Any:
    """The content of a JSON file, or of JSON lines as a list."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise RecipeError(f"captions.file: {path} is broken JSON ({error}); copy it again") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise RecipeError(f"captions.file: {path} line {number} is broken JSON ({error}); correct it") from error
    return rows


def _from_json(path: Path, content: Any, split: str, problems: list[str]) -> Captions:
    if isinstance(content, list):
        return _from_list(_records(content, "entry", problems), problems)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        images = list(_records(content["images"], "image", problems))
        if isinstance(content.get("annotations"), list):
            return _from_coco(images, list(_records(content["annotations"], "annotation", problems)), problems)
        if any("sentences" in record for _, record in images):
            return _from_karpathy(path, images, split, problems)
    if isinstance(content, dict):
        shape = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in list(content.items())[:5])
        found = f"an object with {shape or 'nothing'}"
    else:
        found = f"a {type(content).__name__}"
    raise RecipeError(f"captions.file: {path} holds {found}; {EXPECTED}")


def _records(items: Sequence[Any], kind: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its name in messages."""
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield f"{kind} {number}", item
        else:
            problems.append(f"{kind} {number} is a {type(item).__name__}; expected an object")


def _text(name: str, record: dict[str, Any], key: str, problems: list[str]) -> str | None:
    """A value that must be text; otherwise a problem."""
    value = record.get(key)
    if isinstance(value, str):
        return value
    found = f"{key} {value!r}" if key in record else f"no {key} (but {', '.join(record) or 'nothing'})"
    problems.append(f"{name} has {found}; expected text")
    return None


def _image_path(name: str, record: dict[str, Any], key: str, problems: list[str]) -> str | None:
    value = _text(name, record, key, problems)
    if value is not None and not value.strip():
        problems.append(f"{name} has an empty {key}")
        return None
    return None if value is None else posixpath.normpath(value.strip())


def _from_coco(
    images: list[tuple[str, dict[str, Any]]], annotations: list[tuple[str, dict[str, Any]]], problems: list[str]
) -> Captions:
    captions: Captions = {}
    by_id: dict[Any, str] = {}
    for name, record in images:
        image = _image_path(name, record, "file_name", problems)
        identity = record.get("id")
        if not isinstance(identity, int | str):
            problems.append(f"{name} has id {identity!r}; expected a number or text")
        elif identity in by_id:
            problems.append(f"{name} repeats id {identity} ({by_id[identity]})")
        elif image in captions:
            problems.append(f"{name} repeats {image}")
        elif image is not None:
            captions[image] = []
            by_id[identity] = image
    for name, record in annotations:
        text, identity = _text(name, record, "caption", problems), record.get("image_id")
        if not isinstance(identity, int | str) or identity not in by_id:
            problems.append(f"{name} has image_id {identity!r}, which no image has")
        elif text is not None:
            captions[by_id[identity]].append(text)
    return captions


def _from_karpathy(path: Path, images: list[tuple[str, dict[str, Any]]], split: str, problems: list[str]) -> Captions:
    captions: Captions = {}
    splits = Counter(str(record.get("split")) for _, record in images)
    for name, record in images:
        if record.get("split") != split:
            continue
        image = _image_path(name, record, "filename", problems)
        if image is None:
            continue
        # COCO's has the year's folder apart; Flickr30k's has none.
        folder = record.get("filepath") or ""
        image = posixpath.normpath(posixpath.join(folder, image)) if isinstance(folder, str) else image
        if image in captions:
            problems.append(f"{name} repeats {image}")
            continue
        sentences = record.get("sentences")
        if not isinstance(sentences, list):
            problems.append(f"{name} has sentences {sentences!r}; expected a list")
            continue
        texts = [
            _text(name, sentence, "raw", problems)
            for name, sentence in _records(sentences, f"{image} sentence", problems)
        ]
        captions[image] = [text for text in texts if text is not None]
    _check_split(path, split, splits)
    return captions


def _from_list(records: Iterator[tuple[str, dict[str, Any]]], problems: list[str]) -> Captions:
    """Entries of one text for an image are put together; a list of texts must be all of an image's."""
    captions: Captions = {}
    closed = set()
    for name, record in records:
        image = _image_path(name, record, "image", problems)
        value = record.get("caption")
        several = isinstance(value, list)
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            problems.append(f"{name} has caption {value!r}; expected text or a list of texts")
        elif image is not None and image in captions and (several or image in closed):
            problems.append(f"{name} repeats {image}, whose captions are a list; put all of them into one entry")
        elif image is not None:
            captions.setdefault(image, []).extend(str(text) for text in texts)
            closed |= {image} if several else set()
    return captions


def _from_rows(path: Path, split: str, problems: list[str]) -> Captions:
    """Rows path,caption[,split]. A `.txt` is the same without quotes: the caption is all after the first comma."""
    captions: Captions = {}
    splits: Counter[str] = Counter()
    with path.open(encoding="utf-8-sig", newline="") as stream:
        plain = path.suffix.lower() == ".txt"
        rows = (line.rstrip("\r\n").split(",", 1) for line in stream) if plain else csv.reader(stream)
        columns = ["path" if name.strip() == "image" else name.strip() for name in next(rows, [])]
        absent = [name for name in ("path", "caption") if name not in columns]
        if absent:
            found = ", ".join(columns) or "nothing"
            raise RecipeError(f"captions.file: {path} has no column {' or '.join(absent)}; found {found}; {EXPECTED}")
        for number, values in enumerate(rows, start=2):
            if not any(values):
                continue
            if len(values) != len(columns):
                problems.append(
                    f"row {number} has {len(values)} fields for {len(columns)} columns (a caption with a comma needs "
                    "double quotes)"
                )
                continue
            row = dict(zip(columns, values, strict=True))
            splits[row.get("split", split).strip()] += 1
            if row.get("split", split).strip() == split:
                image = _image_path(f"row {number}", row, "path", problems)
                captions.setdefault(image, []).append(row["caption"]) if image is not None else None
    if splits:
        _check_split(path, split, splits)
    return captions


def _check_split(path: Path, split: str, found: Counter[str]) -> None:
    if not found[split]:
        counts = ", ".join(f"{name}: {count}" for name, count in found.items())
        raise RecipeError(f"captions.split is {split!r}, which {path} does not have; found {counts}")
