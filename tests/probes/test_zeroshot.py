"""Zero-shot and retrieval end to end on the embedded model and pictures that the project ships."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from eva_clip import build_model, tokenize
from eva_clip.transforms import build_eval_transform
from probes import retrieval, zeroshot

REPO = Path(__file__).resolve().parents[2]
SHARD = REPO / "recipes/quickstart/pictures/twemoji_test.tar.gz"


@pytest.fixture(scope="module")
def by_hand():
    """Labels, captions and image embeddings of the shard, from the model's own functions alone."""
    samples = {}
    with tarfile.open(SHARD) as shard:
        for member in shard:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = shard.extractfile(member).read()
    model, _ = build_model("EVA01-CLIP-nano", "pretrained")
    view = build_eval_transform(64)
    images = torch.stack([view(Image.open(io.BytesIO(sample["webp"]))) for sample in samples.values()])
    texts = [json.loads(sample["json"]) for sample in samples.values()]
    with torch.no_grad():
        return model, model.encode_image(images, normalize=True), texts


def arguments(tmp_path, recipe, *extra):
    return [
        str(REPO / f"recipes/quickstart/{recipe}.yaml"),
        f"data.test={SHARD}",
        f"run.dir={tmp_path / 'run'}",
        *extra,
    ]


def test_zero_shot_equals_a_few_lines_of_the_published_api(tmp_path, by_hand):
    model, images, texts = by_hand
    assert zeroshot.main(arguments(tmp_path, "zeroshot")) == 0
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    classes = sorted({text["label"] for text in texts})
    assert result["classes"] == classes
    with torch.no_grad():
        names = model.encode_text(tokenize([name.replace("-", " ") for name in classes]), normalize=True)
    predicted = (images @ names.T).argmax(dim=1).tolist()
    right = [classes[index] == text["label"] for index, text in zip(predicted, texts, strict=True)]
    assert result["scores"][0]["top1"] == pytest.approx(100 * sum(right) / len(right))
    assert "Nothing was trained and nothing was chosen" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_retrieval_equals_a_plain_sort(tmp_path, by_hand):
    model, images, texts = by_hand
    assert retrieval.main(arguments(tmp_path, "retrieval")) == 0
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        captions = model.encode_text(tokenize([text["caption"] for text in texts]), normalize=True)
    nearest = (images @ captions.T).topk(5, dim=1).indices
    hits = (nearest == torch.arange(len(images))[:, None]).any(dim=1).float().mean()
    assert result["measured"]["image_to_text_r5"] == pytest.approx(100 * float(hits), abs=0.3)
    assert result["measured"]["image_to_text_r5"] > 5 * 100 * 5 / len(images)


def test_class_names_come_from_a_file_of_as_many_lines(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n", encoding="utf-8")
    assert zeroshot.main(arguments(tmp_path, "zeroshot", f"prompts.class_names={names}")) == 2
    assert "has 2 names and the data 30 classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path, capsys):
    assert zeroshot.main(arguments(tmp_path, "zeroshot", "prompts.templates=[a photo]")) == 2
    assert "prompts.templates is ['a photo']" in capsys.readouterr().err


def test_images_without_captions_are_named(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / "1.png")
    code = retrieval.main(arguments(tmp_path, "retrieval", "data.format=folder", f"data.test={tmp_path / 'images'}"))
    assert code == 2
    assert "2 image(s) have no caption, the first cat/1.png" in capsys.readouterr().err


def test_plans_read_no_image(tmp_path, capsys):
    assert retrieval.main(arguments(tmp_path, "retrieval", "--plan")) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 376
    assert zeroshot.main(arguments(tmp_path, "zeroshot", "--plan")) == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 30


def test_an_unreadable_image_is_named_or_counted(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / f"{number}.png")
    (tmp_path / "images/cat/0.png").write_bytes(b"no picture")
    folder = ["data.format=folder", f"data.test={tmp_path / 'images'}", "data.workers=1"]
    assert zeroshot.main(arguments(tmp_path, "zeroshot", *folder)) == 2
    message = capsys.readouterr().err
    assert "cat/0.png" in message
    assert "Traceback" not in message
    skipping = [*folder, "data.on_corrupt=skip", "run.on_existing=overwrite"]
    assert zeroshot.main(arguments(tmp_path, "zeroshot", *skipping)) == 0
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["scores"][0]["samples"] == 3
    assert result["notes"] == ["1 unreadable image(s) were left out."]
