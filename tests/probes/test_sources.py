"""Sources: what they list, what they read, and what they say about input that is wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from probes import tar_source
from probes.csv_source import CsvSource
from probes.folder_source import FolderSource
from probes.sections import RecipeError
from probes.sources import expand_braces, open_source
from probes.tar_source import TarSource


def png(number: int = 0) -> bytes:
    """One of scikit-learn's digits as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray((load_images()[number] * 16).clip(0, 255).astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def load_images():
    return load_digits().images[:8]


def write_files(root: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, (kind, target) in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


# Class folders


def test_folder_lists_nested_images_of_any_case_and_ignores_the_rest(tmp_path):
    write_files(
        tmp_path,
        {
            "cat/b.PNG": png(1),
            "cat/deep/er/a.JpEg": png(2),
            "cat/.hidden.png": png(),
            "cat/notes.txt": b"text",
            "cat/.thumbs/t.png": png(),
            "dog/a.tiff": png(3),
            ".git/x.png": png(),
            "README.md": b"read me",
        },
    )
    source = FolderSource(tmp_path)
    assert source.keys == ["cat/b.PNG", "cat/deep/er/a.JpEg", "dog/a.tiff"]
    assert source.labels == ["cat", "cat", "dog"]
    assert source.read(1) == png(2)
    assert source.location(2) == str(tmp_path / "dog" / "a.tiff")
    assert len(source) == 3


def test_folder_order_does_not_depend_on_the_filesystem(tmp_path, monkeypatch):
    write_files(tmp_path, {f"{label}/{i}.png": png() for label in "ba" for i in (10, 9, 1)})
    expected = FolderSource(tmp_path).keys
    walk, listing = os.walk, Path.iterdir

    def reversed_walk(*args, **kwargs):
        for current, folders, names in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield current, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listing(self), reverse=True)))
    assert (
        FolderSource(tmp_path).keys == expected == ["a/1.png", "a/10.png", "a/9.png", "b/1.png", "b/10.png", "b/9.png"]
    )


def test_folder_follows_links_and_survives_a_cycle(tmp_path):
    write_files(tmp_path, {"store/one.png": png(1), "store/two.png": png(2), "data/dog/x.png": png()})
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "dog" / "linked.png").symlink_to(tmp_path / "store" / "two.png")
    (tmp_path / "data" / "dog" / "again").symlink_to(tmp_path / "data" / "dog")
    source = FolderSource(tmp_path / "data")
    assert source.keys == ["cat/one.png", "cat/two.png", "dog/linked.png", "dog/x.png"]
    assert source.read(2) == png(2)


def test_folder_names_a_dangling_link(tmp_path):
    write_files(tmp_path, {"cat/a.png": png(), "dog/a.png": png()})
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(RecipeError, match=r"dog/gone\.png is a link to nothing"):
        FolderSource(tmp_path)


def test_empty_class_folder_is_named(tmp_path):
    write_files(tmp_path, {"cat/a.png": png(), "dog/readme.txt": b""})
    with pytest.raises(RecipeError, match=r"1 class folder.*dog; add images or remove"):
        FolderSource(tmp_path)


def test_images_without_class_folders_get_a_remedy(tmp_path):
    write_files(tmp_path, {"a.png": png(), "b.jpg": png()})
    with pytest.raises(RecipeError, match=r"2 image\(s\) but no class folders; put the images of each class"):
        FolderSource(tmp_path)


def test_a_folder_of_splits_is_not_read_as_classes(tmp_path):
    write_files(tmp_path, {"train/cat/a.png": png(), "val/cat/a.png": png()})
    with pytest.raises(RecipeError, match=r"holds splits \(train, val\), not classes; name .*train"):
        FolderSource(tmp_path)


# The fingerprint


def test_fingerprint_sees_label_size_and_time_but_not_content(tmp_path):
    write_files(tmp_path, {"cat/a.png": b"1234", "dog/b.png": b"5678"})
    os.utime(tmp_path / "cat/a.png", ns=(0, 1_000))
    first = FolderSource(tmp_path).fingerprint()
    (tmp_path / "cat/a.png").write_bytes(b"abcd")
    os.utime(tmp_path / "cat/a.png", ns=(0, 1_000))
    assert FolderSource(tmp_path).fingerprint() == first
    os.utime(tmp_path / "cat/a.png", ns=(0, 1_001))
    later = FolderSource(tmp_path).fingerprint()
    (tmp_path / "cat/a.png").write_bytes(b"longer")
    os.utime(tmp_path / "cat/a.png", ns=(0, 1_001))
    longer = FolderSource(tmp_path).fingerprint()
    (tmp_path / "cat").rename(tmp_path / "cow")
    renamed = FolderSource(tmp_path)
    assert len({first, later, longer, renamed.fingerprint()}) == 4
    assert renamed.fingerprint([0]) != renamed.fingerprint([1])
    assert renamed.fingerprint([1, 0]) == renamed.fingerprint()


# CSV


@pytest.fixture
def pictures(tmp_path):
    return write_files(tmp_path, {f"images/{i}.png": png(i) for i in range(4)})


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "data.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_csv_paths_are_relative_to_the_file_and_a_byte_order_mark_is_read(pictures, monkeypatch):
    path = write_csv(pictures, 'path, label\nimages/0.png,"a, b"\n\nimages/1.png, Ü \n', "utf-8-sig")
    monkeypatch.chdir("/")
    source = CsvSource(path, "train")
    assert source.keys == ["images/0.png", "images/1.png"]
    assert source.labels == ["a, b", "Ü"]
    assert source.read(1) == png(1)


def test_csv_keeps_the_rows_of_its_split(pictures):
    path = write_csv(
        pictures,
        "split,path,label\nTrain,images/0.png,a\nvalidation,images/1.png,a\ntrain,images/2.png,b\n",
    )
    assert CsvSource(path, "train").keys == ["images/0.png", "images/2.png"]
    assert CsvSource(path, "val").keys == ["images/1.png"]
    assert CsvSource(path, None).keys == ["images/0.png", "images/1.png", "images/2.png"]
    with pytest.raises(RecipeError, match=r"no row of split 'test'; found Train: 1, validation: 1, train: 1"):
        CsvSource(path, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimages/0.png,a\n", r"no column path; found file, label; expected path,label\[,split\]"),
        ("path;label\nimages/0.png;a\n", r"no column path or label; found path;label"),
        ("", r"no column path or label; found nothing"),
        ("path,label\n", r"has no row"),
        ("path,label\nimages/0.png,a\nimages/1.png, \n", r"row 3 has an empty label"),
        ("path,label\n,a\n", r"row 2 has an empty path"),
        ("path,label\nimages/0.png,a\nimages/1.png,a\n./images/0.png,b\n", r"row 4 repeats row 2"),
        ("path,label,split\nimages/0.png,a,trian\n", r"row 2 has split 'trian'; expected train, val or test"),
        (
            "path,label\nimages/0.png,a,b\n",
            r"row 2 has 3 fields for 2 columns; put fields that contain a comma",
        ),
    ],
)
def test_csv_mistakes_are_named(pictures, text, message):
    with pytest.raises(RecipeError, match=message):
        CsvSource(write_csv(pictures, text), "train")


def test_csv_missing_files_are_collected_with_row_numbers(pictures):
    rows = "".join(f"gone/{i}.png,a\n" for i in range(7))
    path = write_csv(pictures, "path,label\nimages/0.png,a\n" + rows)
    with pytest.raises(RecipeError, match=r"7 missing file\(s\) in 8 row\(s\)") as caught:
        CsvSource(path, "train")
    message = str(caught.value)
    assert [f"row {row}: " in message for row in range(2, 10)] == [False, *[True] * 5, False, False]
    assert "and 2 more" in message


def test_csv_in_another_encoding_is_an_error(pictures):
    with pytest.raises(RecipeError, match="save it as UTF-8"):
        CsvSource(write_csv(pictures, "path,label\nimages/0.png,grün\n", "latin-1"), "train")


# Tar shards

SAMPLES = {
    "a/one.png": png(1),
    "a/one.cls": b"cat\n",
    "a/one.txt": b"a cat\n",
    "two.JPG": png(2),
    "two.json": json.dumps({"label": "dog", "caption": "a dog"}).encode(),
    "._two.json": b"\xff",
    "LICENSE": b"free",
}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_tar_samples_and_captions_also_after_pickling(tmp_path, suffix):
    source = TarSource([write_tar(tmp_path / f"x{suffix}", SAMPLES)])
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert opened.keys == [f"x{suffix}/a/one.png", f"x{suffix}/two.JPG"]
        assert opened.labels == ["cat", "dog"]
        assert opened.captions == ["a cat", "a dog"]
        assert [opened.read(i) for i in (1, 0)] == [png(2), png(1)]
    assert source.location(0) == f"{tmp_path / f'x{suffix}'}: a/one.png"


def test_tar_integer_labels_with_and_without_names(tmp_path):
    members = {"x.png": png(), "x.cls": b"1", "y.png": png(), "y.json": b'{"label": 0}'}
    assert TarSource([write_tar(tmp_path / "plain.tar", members)]).labels == ["1", "0"]
    named = {"classes.txt": b"cat\ndog\n", **members}
    assert TarSource([write_tar(tmp_path / "named.tar", named)]).labels == ["dog", "cat"]
    with pytest.raises(RecipeError, match=r"x\.png has label 1; classes\.txt names 1 classes"):
        TarSource([write_tar(tmp_path / "few.tar", {**named, "classes.txt": b"cat\n"})])


def test_tar_shards_by_brace_expansion_and_by_list(tmp_path):
    for number in range(9, 12):
        write_tar(tmp_path / f"x-{number:03d}.tar", {"k.png": png(number % 8), "k.cls": str(number).encode()})
    source = open_source("tar", f"{tmp_path}/x-{{009..010}}.tar, {tmp_path}/x-011.tar", "train")
    assert source.keys == [f"x-{number:03d}.tar/k.png" for number in range(9, 12)]
    assert source.read(2) == png(11 % 8)
    assert expand_braces("a{0..1}b{08..10}") == [f"a{i}b{j}" for i in "01" for j in ("08", "09", "10")]
    with pytest.raises(RecipeError, match=r"x-012\.tar.*did you mean .*x-01[01]\.tar"):
        open_source("tar", f"{tmp_path}/x-{{011..012}}.tar", "train")
    with pytest.raises(RecipeError, match="counts backwards"):
        expand_braces("x-{3..1}.tar")


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png"])
def test_tar_member_that_climbs_out_is_named(tmp_path, name):
    path = write_tar(tmp_path / "bad.tar", {"ok.png": png(), "ok.cls": b"a", name: png()})
    with pytest.raises(RecipeError, match="climbs out") as caught:
        TarSource([path])
    assert str(path) in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "target"),
    [(tarfile.SYMTYPE, "../../etc/passwd"), (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../x")],
)
def test_tar_link_that_points_outside_is_named(tmp_path, kind, target):
    path = write_tar(tmp_path / "bad.tar", {"a/ok.png": png(), "a/ok.cls": b"a"}, {"a/evil.png": (kind, target)})
    with pytest.raises(RecipeError, match=r"bad\.tar: member a/evil\.png climbs out"):
        TarSource([path])


def test_tar_link_inside_stands_for_its_target(tmp_path):
    members = {"a/x.png": png(3), "a/x.cls": b"1", "b/y.cls": b"2"}
    path = write_tar(tmp_path / "links.tar", members, {"b/y.png": (tarfile.SYMTYPE, "../a/x.png")})
    source = TarSource([path])
    assert source.keys == ["links.tar/a/x.png", "links.tar/b/y.png"]
    assert source.read(1) == png(3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.png": png()}, r"x has no label"),
        ({"x.png": png(), "x.json": b"{}"}, r"x has no label"),
        ({"x.png": png(), "x.cls": b" "}, r"x has no label"),
        ({"x.cls": b"1"}, r"x has no image\(s\) among cls"),
        ({"x.png": png(), "x.jpg": png(), "x.cls": b"1"}, r"x has 2 image\(s\)"),
        ({"x.png": png(), "x.json": b"{"}, r"x has an unreadable label"),
        ({"x.png": png(), "x.json": b'{"label": [1]}'}, r"label is \[1\]"),
        ({"README": b""}, r"holds no samples"),
    ],
)
def test_tar_sample_mistakes_are_named(tmp_path, members, message):
    with pytest.raises(RecipeError, match=message):
        TarSource([write_tar(tmp_path / "x.tar", members)])


@pytest.mark.parametrize("keep", [0, 100, 512 + 50, 1024, 1024 + 100, 2048])
def test_truncated_tar_is_an_error_wherever_it_is_cut(tmp_path, keep):
    whole = write_tar(tmp_path / "x.tar", {"x.png": png(), "x.cls": b"1"}).read_bytes()
    assert len(png()) < 512  # the cuts above fall in a header, in data, and between members
    (tmp_path / "x.tar").write_bytes(whole[:keep])
    with pytest.raises(RecipeError, match=r"x\.tar is truncated.*copy or build it again"):
        TarSource([tmp_path / "x.tar"])


def test_truncated_or_false_gzip_is_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar.gz", {"x.png": png(), "x.cls": b"1"})
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"not gzip", gzip.compress(b"no tar" * 200)):
        path.write_bytes(damaged)
        with pytest.raises(RecipeError, match=r"x\.tar\.gz is truncated"):
            TarSource([path])


def test_large_compressed_shard_is_refused_with_the_remedy(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar.gz", {"x.png": png(), "x.cls": b"1"})
    monkeypatch.setattr(tar_source, "UNPACKED_LIMIT", 100)
    with pytest.raises(RecipeError, match=r"unpacks to more than .* decompress it"):
        TarSource([path])
    monkeypatch.setattr(tar_source, "COMPRESSED_LIMIT", 10)
    with pytest.raises(RecipeError, match=r"GiB compressed.*decompress it \(gunzip"):
        TarSource([path])


def test_shard_that_shrinks_while_in_use_is_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"x.png": png(), "x.cls": b"1"})
    source = TarSource([path])
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(RecipeError, match="became shorter"):
        source.read(0)


# open_source


def test_several_folders_are_read_as_one(tmp_path):
    write_files(tmp_path, {"one/cat/a.png": png(1), "two/cat/a.png": png(2), "two/dog/b.png": png(3)})
    source = open_source("folder", f"{tmp_path}/one,{tmp_path}/two", "train")
    assert source.keys == ["one/cat/a.png", "two/cat/a.png", "two/dog/b.png"]
    assert source.labels == ["cat", "cat", "dog"]
    assert [source.read(i) for i in range(3)] == [png(1), png(2), png(3)]
    assert source.location(1) == str(tmp_path / "two/cat/a.png")
    assert source.fingerprint([0]) != source.fingerprint([1])
    with pytest.raises(RecipeError, match="the same path twice"):
        open_source("folder", f"{tmp_path}/one,{tmp_path}/one", "train")


def test_a_path_with_a_comma_that_exists_is_one_path(tmp_path):
    write_files(tmp_path, {"a,b/cat/a.png": png(1)})
    assert open_source("folder", f"{tmp_path}/a,b", "train").keys == ["cat/a.png"]


def test_missing_path_is_named_with_what_was_expected_and_what_is_near(tmp_path):
    write_files(tmp_path, {"Pictures/train/cat/a.png": png()})
    with pytest.raises(RecipeError, match="nothing at") as caught:
        open_source("folder", f"{tmp_path}/pictures/train", "test")
    message = str(caught.value)
    assert message.startswith("data.test: ")
    assert f"{tmp_path}/pictures/train" in message
    assert "one sub-folder of images per class" in message
    assert f"did you mean {tmp_path}/Pictures?" in message


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("csv", "data", "is a folder; expected a CSV file"),
        ("tar", "data", "is a folder; expected WebDataset shards"),
        ("folder", "list.csv", r"is a file; expected a folder.*data\.format=csv"),
        ("folder", "x.tar.gz", r"is a file; expected a folder.*data\.format=tar"),
        ("tar", "list.csv", "no tar file"),
    ],
)
def test_path_of_another_format_is_an_error(tmp_path, format, name, message):
    write_files(tmp_path, {"data/cat/a.png": png(), "list.csv": b"path,label\n", "x.tar.gz": b""})
    with pytest.raises(RecipeError, match=message):
        open_source(format, str(tmp_path / name), "train")


def test_importing_splits_and_sources_loads_no_torch():
    code = "import sys, probes.sources, probes.splits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
