"""export: each format gives what the net gives, for any number of images, in its own runtime."""
import numpy as np
import pytest

import seresnet
from conftest import run_module
from seresnet import export


@pytest.mark.parametrize("kind", export.SUFFIXES)
def test_an_exported_net_does_what_the_net_does(run, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    folder, test, _ = run
    path = tmp_path / f"model{export.SUFFIXES[kind]}"
    status, output, errors = run_module("export", tmp_path, "--checkpoint", folder, "--format", kind, "--tta", "flip", "--out", path)
    assert status == 0, errors
    assert "MB" in output and "ms for one image" in output and list(tmp_path.iterdir()) == [path]
    run_file, expected = export.open_exported(kind, path), seresnet.load(folder, "cpu", "fp32").probabilities(test.images, "flip")
    for count in (1, 2, 60):
        assert np.abs(run_file(test.images[:count]) - expected[:count]).max() < 1e-4


def test_a_file_that_does_not_do_it_is_not_kept(run, tmp_path, monkeypatch):
    folder, _, _ = run
    monkeypatch.setattr("sys.argv", ["export", "--checkpoint", str(folder), "--format", "exported", "--out", str(tmp_path / "m.pt2")])
    whole = export.open_exported
    monkeypatch.setattr(export, "open_exported", lambda kind, path: lambda images: whole(kind, path)(images)[:, ::-1])
    assert export.main() == 1 and list(tmp_path.iterdir()) == []


def test_mistakes_end_in_one_message(run, tmp_path):
    status, _, errors = run_module("export", tmp_path, "--checkpoint", run[0], "--format", "exported", "--data", "nowhere.beton")
    assert status == 2 and "nowhere.beton: cannot be read" in errors and "Traceback" not in errors
