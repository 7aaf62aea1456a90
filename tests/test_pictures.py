"""pictures: they are drawn for few and for many classes, runs and images, and nothing is cut off."""
import re

import numpy as np
import pytest
from PIL import Image

from seresnet import pictures


def ink_at_the_edge(path):
    """Whether anything is drawn in the picture's outermost two pixels."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return any((edge < 250).any() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))


@pytest.mark.parametrize("classes", [2, 10, 30, 100])
def test_a_confusion_matrix(tmp_path, classes):
    counts = np.random.default_rng(0).integers(0, 20, (classes, classes)) + np.eye(classes, dtype=int) * 200
    names = [f"class with a long name {i}" for i in range(classes)]
    pictures.draw_confusion(counts, names, "a test", tmp_path / "c.png")
    assert not ink_at_the_edge(tmp_path / "c.png")


@pytest.mark.parametrize("name", ["$x_$", "$a$ b$c$", "日本", "_x", "a^b_c"])
def test_names_are_drawn_as_they_are_written(tmp_path, name, recwarn):
    pictures.draw_confusion(np.eye(2, dtype=int), [name, "b"], name, tmp_path / "c.png")
    pictures.draw_sheet(np.zeros((1, 8, 8, 3), np.uint8), [name], name, tmp_path / "s.png", columns=1)
    records = [{"epoch": 1, "test_accuracy": 0.5}]
    pictures.draw_runs([{"label": name, "records": records, "outcome": {"train_seconds": 1, "eval_seconds": 1, "accuracy_tta": 0.5}}],
                       tmp_path / "r.svg")
    drawn = re.findall("<!-- (.*?) -->", (tmp_path / "r.svg").read_text())
    assert not recwarn.list and name.strip("$") in " ".join(drawn)


@pytest.mark.parametrize("count", [1, 8, 40])
def test_a_contact_sheet(tmp_path, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    pictures.draw_sheet(images, ["airplane\n\u2192 automobile 99%"] * count, "a test", tmp_path / "s.png", columns=8,
                        column_titles=[f"epoch {i}" for i in range(8)])
    assert not ink_at_the_edge(tmp_path / "s.png")


@pytest.mark.parametrize("count", [1, 3, 20])
def test_runs(tmp_path, count):
    records = [{"epoch": e, "test_accuracy": None if e == 2 else 1 - 1 / (e + 1)} for e in range(1, 9)]
    runs = [{"label": f"se94-20261124-10150{i}", "records": records,
             "outcome": {"train_seconds": 100 + i, "eval_seconds": 5, "accuracy_tta": 0.9 + i / 1000} if i % 2 == 0 else None}
            for i in range(count)]
    pictures.draw_runs(runs, tmp_path / "r.png")
    assert not ink_at_the_edge(tmp_path / "r.png")


def test_shift(tmp_path):
    pictures.draw_shift({name: [0.9, 0.8, 0.7, 0.6, 0.5] for name in ("noise", "pixelation")}, 0.95, "a test", tmp_path / "s.png")
    assert not ink_at_the_edge(tmp_path / "s.png")
