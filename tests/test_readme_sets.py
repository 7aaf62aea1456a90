"""The README's examples of other data sets, run verbatim. A file of its own: it takes a minute, beside test_readme.py's."""
import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from test_readme import CLASSES, examples, place, shell    # noqa: F401 one is a fixture


def test_other_data_sets(place):
    """Kaggle's folder, the Hub's parquet and arrays, verbatim; those of Kaggle's CIFAR-10 and CIFAR-100 as far as the test of every command goes."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = {name: sorted((place / "pets" / name).iterdir()) for name in CLASSES}
    for folder in ("kaggle/train", "kaggle/test", "hub"):
        (place / folder).mkdir(parents=True)
    labels, x, y, columns = ["id,label"], [], [], {"img": [], "label": []}
    for c, name in enumerate(CLASSES):
        for path in pictures[name]:
            Image.open(path).save(place / "kaggle/train" / f"{len(y) + 1}.png")
            labels.append(f"{len(y) + 1},{name}")
            x.append(np.asarray(Image.open(path)))
            y.append(c)
            columns["img"].append({"bytes": path.read_bytes(), "path": path.name})
            columns["label"].append(c)
    (place / "kaggle/trainLabels.csv").write_text("\n".join(labels) + "\n")
    for path in (place / "new_pets").iterdir():
        shutil.copy(path, place / "kaggle/test" / f"{int(path.stem) + 1}.png")
    parquet.write_table(pyarrow.table(columns), place / "hub/train-00000-of-00001.parquet")
    parquet.write_table(pyarrow.table({name: values[::5] for name, values in columns.items()}), place / "hub/test-00000-of-00001.parquet")
    np.savez(place / "arrays.npz", x_train=x, y_train=y, x_test=x[::5], y_test=y[::5])
    (_, small), (_, cifar10), (_, hundred) = examples("Other data sets")
    output = shell(place, small)
    for described in ("images and trainLabels.csv in kaggle", "parquet files in hub", "arrays in arrays.npz"):
        assert described in output, output
    rows = list(csv.reader((place / "submission.csv").read_text().splitlines()))
    assert rows[0] == ["id", "label"] and [row[0] for row in rows[1:]] == [str(i) for i in range(1, 15)]
    assert sum(row[1] == CLASSES[(int(row[0]) - 1) % 7] for row in rows[1:]) >= 12, rows
    assert "--sources.path cifar-10 " in cifar10 and "--model.classes 100" in hundred
