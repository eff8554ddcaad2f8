from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from probes.caption_file import load_captions
from probes.captions import open_captioned_split, tokenize_captions
from probes.retrieval_sections import CaptionsSection
from probes.sections import DataSection, RecipeError

REPO = Path(__file__).resolve().parents[2]
TEXTS = {"china.png": ["a temple", "a roof in china"], "flower.png": ["a flower"]}
FORMS = {
    "karpathy.json": {
        "images": [
            {"filename": name, "split": "test", "sentences": [{"raw": text} for text in texts]}
            for name, texts in TEXTS.items()
        ]
        + [{"filename": "other.png", "split": "train", "sentences": [{"raw": "not of this split"}]}]
    },
    "coco.json": {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(TEXTS)],
        "annotations": [
            {"image_id": number, "caption": text} for number, texts in enumerate(TEXTS.values()) for text in texts
        ],
    },
    "list.json": [{"image": name, "caption": texts} for name, texts in TEXTS.items()],
}


@pytest.fixture
def pictures(tmp_path):
    for name, pixels in zip(TEXTS, load_sample_images().images, strict=True):
        Image.fromarray(pixels).resize((48, 32)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_json_form_says_the_same(tmp_path, name):
    assert load_captions(write(tmp_path, name, FORMS[name]), "test") == TEXTS


def test_rows_and_json_lines_say_the_same(tmp_path):
    rows = "path,caption\n" + "".join(f"{name},{text}\n" for name, texts in TEXTS.items() for text in texts)
    assert load_captions(write(tmp_path, "rows.csv", rows), "test") == TEXTS
    lines = "\n".join(json.dumps({"image": name, "caption": text}) for name, texts in TEXTS.items() for text in texts)
    assert load_captions(write(tmp_path, "lines.jsonl", lines), "test") == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is broken JSON"),
        ("a.json", {"pictures": []}, "expected one of"),
        ("a.json", [{"image": "x.png", "caption": " "}], "x.png has an empty caption"),
        ("a.json", [{"image": "x.png", "caption": 7}], "expected text or a list of texts"),
        ("a.csv", "path,text\nx.png,a\n", "has no column caption; found path, text"),
        ("a.csv", "path,caption\nx.png,one, two\n", "row 2 has 3 fields for 2 columns"),
    ],
)
def test_mistakes_of_a_file_are_named(tmp_path, name, content, message):
    with pytest.raises(RecipeError, match=message):
        load_captions(write(tmp_path, name, content), "test")


def test_another_split_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(RecipeError, match=r"captions.split is 'val'.*test: 2.*train: 1"):
        load_captions(write(tmp_path, "k.json", FORMS["karpathy.json"]), "val")


def test_missing_images_are_counted_and_named(pictures):
    file = write(pictures, "list.json", [*FORMS["list.json"], {"image": "gone.png", "caption": "nothing"}])
    data = DataSection(format="folder", test=str(pictures))
    with pytest.raises(RecipeError, match=r"1 of the 3 images of captions.file are missing: .*gone.png"):
        open_captioned_split(data, CaptionsSection(file=str(file)))


def test_captions_know_their_image_and_are_cut_to_so_many(pictures):
    file = str(write(pictures, "list.json", FORMS["list.json"]))
    data = DataSection(format="folder", test=str(pictures))
    captioned = open_captioned_split(data, CaptionsSection(file=file))
    assert (captioned.texts, captioned.owner) == (["a temple", "a roof in china", "a flower"], [0, 0, 1])
    assert open_captioned_split(data, CaptionsSection(file=file, per_image=1)).owner == [0, 1]


def test_a_long_caption_is_named_or_cut(pictures):
    file = str(write(pictures, "list.json", [{"image": "china.png", "caption": "word " * 90}]))
    captioned = open_captioned_split(DataSection(format="folder", test=str(pictures)), CaptionsSection(file=file))
    with pytest.raises(RecipeError, match=r"1 caption\(s\) have more than the 77 tokens .*china.png.*truncate=true"):
        tokenize_captions(captioned, 77, truncate=False)
    assert tokenize_captions(captioned, 77, truncate=True).shape == (1, 77)


def run(tmp_path: Path, name: str, command: str, processes: int) -> dict:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    overrides = [f"run.dir={tmp_path / name}", "data.test=recipes/quickstart/pictures/twemoji_test.tar.gz"]
    argv = [sys.executable, *launcher, "-m", f"probes.{command}", f"recipes/quickstart/{command}.yaml", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / name / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["retrieval", "zeroshot"])
def test_two_processes_measure_what_one_does(tmp_path, command):
    one, two = run(tmp_path, "one", command, 1), run(tmp_path, "two", command, 2)
    for result in (one, two):
        result.pop("facts", None)  # the duration
    assert one == two
