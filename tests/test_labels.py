"""Class names are read from every form they come in, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectgrad_ref.errors import InvalidTarget
from rectgrad_ref.images import prepare
from rectgrad_ref.labels import class_names, metadata_labels, read_labels

NAMES = ("cat", "dog", "great white shark")


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\ngreat white shark",
        "cat\r\ndog \r\ngreat white shark\r\n\r\n",
        "\ufeffcat\ndog\ngreat white shark\n",
        "n02121620 cat, true cat\nn02084071 dog\nn01484850 great white shark, white shark\n",
    ],
)
def test_text_files(tmp_path: Path, text: str) -> None:
    assert read_labels(write(tmp_path / "labels.txt", text)) == NAMES


def test_only_a_synset_line_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.txt", "tench, Tinca tinca\nn01440764\nn014 tench, fish\n")
    assert read_labels(path) == ("tench, Tinca tinca", "n01440764", "n014 tench, fish")


@pytest.mark.parametrize(
    "content",
    [
        list(NAMES),
        {"2": "great white shark", "0": "cat", "1": "dog"},
        {"model_type": "vit", "id2label": {str(i): name for i, name in enumerate(NAMES)}},
        {"architecture": "resnet50", "label_names": list(NAMES)},
        {"pretrained_cfg": {"label_names": list(NAMES)}},
        {
            "0": ["n02121620", "cat"],
            "1": ["n02084071", "dog"],
            "2": ["n01484850", "great white shark"],
        },
    ],
)
def test_json_files(tmp_path: Path, content: Any) -> None:
    assert read_labels(write(tmp_path / "labels.json", content)) == NAMES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no names"),
        ("a.txt", "cat\n\ndog", "class 1 has no name"),
        ("a.json", "{ damaged", "not a file of class names"),
        ("a.json", [], "no names"),
        ("a.json", "3", "neither a list"),
        ("a.json", ["cat", 3], "class 1 has no name: 3"),
        ("a.json", {"0": "cat", "2": "dog"}, "indices of 2 classes must be 0 … 1"),
        ("a.json", {"0": "cat", "00": "dog"}, "indices of 2 classes"),
        ("a.json", {"cat": 0, "dog": 1}, "invalid literal"),
    ],
)
def test_files_that_name_no_classes(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidTarget, match=message) as caught:
        read_labels(path)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidTarget, match=r"none\.txt: cannot read .*No such file"):
        read_labels(tmp_path / "none.txt")
    with pytest.raises(InvalidTarget, match="cannot read"):
        read_labels(tmp_path)
    binary = tmp_path / "a.txt"
    binary.write_bytes(b"\xff\xfe\x00cat")
    with pytest.raises(InvalidTarget, match="not a file of class names"):
        read_labels(binary)


@pytest.mark.parametrize("key", ["class_names", "names", "label_names", "id2label", "classes"])
@pytest.mark.parametrize(
    "value",
    [
        json.dumps(NAMES),
        json.dumps(dict(enumerate(NAMES))),
        repr(list(NAMES)),
        repr(dict(enumerate(NAMES))),
    ],
)
def test_metadata(key: str, value: str) -> None:
    assert metadata_labels({"author": "somebody", key: value}) == NAMES


def test_metadata_keys_in_their_order() -> None:
    assert metadata_labels({"names": '["a"]', "class_names": '["b"]'}) == ("b",)


@pytest.mark.parametrize("value", ["", "cat, dog", "labels.txt", "[1, 2]", "{'a': 'b'}", "[", "3"])
def test_metadata_that_names_no_classes_is_passed_over(value: str) -> None:
    assert metadata_labels({"class_names": value}) is None
    assert metadata_labels({"class_names": value, "names": '["a"]'}) == ("a",)


@given(st.text())
def test_any_metadata_is_read_or_passed_over(text: str) -> None:
    names = metadata_labels({"class_names": text})
    assert names is None or all(names)


def test_class_names_come_from_the_argument_first(tmp_path: Path) -> None:
    metadata = {"class_names": '["a", "b", "c"]'}
    path = write(tmp_path / "labels.txt", "\n".join(NAMES))
    assert class_names(3, path, metadata=metadata) == NAMES
    assert class_names(3, str(path)) == NAMES
    assert class_names(3, list(NAMES)) == NAMES
    assert class_names(3, metadata=metadata) == ("a", "b", "c")
    assert class_names(3) is None
    assert class_names(3, metadata={"author": "somebody"}) is None


def test_background_class_comes_first() -> None:
    names = [f"class {index}" for index in range(1000)]
    assert class_names(1001, names) == ("background", *names)
    assert class_names(1000, names) == tuple(names)
    assert class_names(1001, ["none", *names]) == ("none", *names)


def test_count_mismatch(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.txt", "\n".join(NAMES))
    with pytest.raises(
        InvalidTarget, match=r"labels\.txt: 3 class names for a model of 10 classes"
    ):
        class_names(10, path)
    with pytest.raises(InvalidTarget, match="labels: 2 class names for a model of 3"):
        class_names(3, ["a", "b"])
    with pytest.raises(InvalidTarget, match="metadata: 1 class names for a model of 4"):
        class_names(4, metadata={"names": '["a"]'})
    with pytest.raises(InvalidTarget, match="999 class names for a model of 1001"):
        class_names(1001, ["a"] * 999)


@pytest.mark.parametrize(
    ("photo", "name"),
    [
        ("pelican.jpeg", "pelican"),
        ("bald_eagle.jpeg", "bald eagle"),
        ("coral_cat.bmp", "Egyptian cat"),
        ("coral_hot_dog.jpg", "hotdog"),
    ],
)
def test_mobilenet_with_a_background_class_names_photos(
    shared_data: Path, photo: str, name: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    models = shared_data / "models"
    names = class_names(1001, models / "imagenet_synsets.txt")
    assert names is not None
    session = onnxruntime.InferenceSession(models / "imagenet_mobilenet_v2_1.0_224.onnx")
    picture = shared_data / "photos" / photo
    array = prepare(picture, (None, 3, 224, 224), preprocess="mobilenet_tf").array
    (scores,) = session.run(None, {"input": array})
    assert names[scores.argmax()] == name
