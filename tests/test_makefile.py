"""make and its scripts: what they say and choose, with every program they call replaced by one that records the call."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path):
    """A copy of the make files, with a .venv/bin/python that notes its arguments and exits as `answers` says."""
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "pyproject.toml", "scripts/setup.sh", "scripts/train.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$@" >>calls\nnumber=$(wc -l <calls)\nexit $(sed -n "${number}p" answers)\n')
    python.chmod(0o755)
    return tmp_path


def train(clone, answers, *arguments, **environment):
    """(exit status, output, the calls) of scripts/train.sh, the programs exiting with `answers` in turn."""
    (clone / "answers").write_text("".join(f"{a}\n" for a in answers))
    kept = {k: v for k, v in os.environ.items() if k != "CIFAR10_DIR"}
    done = subprocess.run(["sh", "scripts/train.sh", *arguments], cwd=clone, text=True, capture_output=True,
                          env={**kept, **environment})
    return done.returncode, done.stdout + done.stderr, (clone / "calls").read_text().splitlines()


@pytest.fixture
def recipe(clone):
    """A recipe of CIFAR-10 in it, which falls back where there are no data."""
    (clone / "x.yaml").write_text("beton:\n  train: data/cifar10_train.beton\n")
    return clone


def test_data_at_hand_are_converted_and_trained_on(clone):
    status, _, calls = train(clone, [0, 0], "rn_configs/se94.yaml", "--loop.epochs", "2")
    assert status == 0 and calls == ["write_datasets.py --config-file rn_configs/se94.yaml --loop.epochs 2",
                                     "ffcv_train.py --config-file rn_configs/se94.yaml --loop.epochs 2"]


def test_a_named_folder_is_used_or_nothing(clone):
    status, _, calls = train(clone, [0, 0], "x.yaml", CIFAR10_DIR="some where")
    assert status == 0 and calls == ["write_datasets.py --config-file x.yaml --default-source some where",
                                     "ffcv_train.py --config-file x.yaml"]
    (clone / "calls").unlink()
    status, _, calls = train(clone, [4], "x.yaml", CIFAR10_DIR="nowhere")
    assert status == 4 and len(calls) == 1


def test_a_recipe_of_own_images_leaves_that_folder_alone(clone):
    (clone / "own.yaml").write_text("beton:\n  train: data/own_train.beton\n")
    for answers, programs in (([0, 0], 2), ([4], 1)):
        status, _, calls = train(clone, answers, "own.yaml", CIFAR10_DIR="some where")
        assert status == answers[-1] and len(calls) == programs and calls[0] == "write_datasets.py --config-file own.yaml"
        (clone / "calls").unlink()


def test_without_data_it_downloads(recipe):
    clone = recipe
    status, output, calls = train(clone, [4, 0, 0], "x.yaml")
    assert status == 0 and calls[1:] == ["write_datasets.py --config-file x.yaml --sources.kind download",
                                         "ffcv_train.py --config-file x.yaml"]
    assert "downloading CIFAR-10" in output


def test_without_data_and_network_it_says_so_and_takes_the_digits(recipe):
    clone = recipe
    status, output, calls = train(clone, [4, 4, 0, 0], "x.yaml", "--loop.epochs", "2")
    assert status == 0 and calls[2:] == ["write_datasets.py --config-file rn_configs/digits.yaml",
                                         "ffcv_train.py --config-file rn_configs/digits.yaml"]
    assert "make train CIFAR10_DIR=" in output and "digits" in output


def test_who_names_a_place_or_has_own_images_gets_those_or_an_error(recipe):
    status, output, calls = train(recipe, [4], "x.yaml", "--sources.path", "petz")
    assert status == 4 and len(calls) == 1 and not output
    (recipe / "calls").unlink()
    for name, falls_back in (("own_images", False), ("se94", True), ("seed_200", True), ("resnet18", True)):
        status, output, _ = train(recipe, [4, 0, 0], str(ROOT / f"rn_configs/{name}.yaml"))
        assert status == (0 if falls_back else 4) and ('own_images.yaml ARGS="--sources.path FOLDER"' in output) != falls_back, name
    assert train(recipe, [4, 0, 0], "x.yaml", "--sources.fit", "crop")[0] == 0


def test_what_was_converted_before_is_trained_on(recipe):
    (recipe / "data").mkdir()
    for split in ("train", "test"):
        assert "downloading" in train(recipe, [4, 0, 0], "x.yaml")[1]
        (recipe / "calls").unlink()
        (recipe / f"data/cifar10_{split}.beton").touch()
    status, output, calls = train(recipe, [4, 0], "x.yaml")
    assert status == 0 and calls[1:] == ["ffcv_train.py --config-file x.yaml"] and "converted before" in output


@pytest.mark.parametrize("named", [["--beton.train", "a b.beton", "--beton.test=c.beton"], ["--beton.test", "c.beton"]])
def test_of_what_was_converted_before_those_files_are_trained_on_that_are_named(recipe, named):
    (recipe / "data").mkdir()
    for split in ("train", "test"):
        (recipe / f"data/cifar10_{split}.beton").touch()
    assert "downloading" in train(recipe, [4, 0, 0], "x.yaml", *named)[1]
    (recipe / "calls").unlink()
    for name in ("a b.beton", "c.beton"):
        (recipe / name).touch()
    status, output, calls = train(recipe, [4, 0], "x.yaml", *named)
    assert status == 0 and calls[1:] == [f"ffcv_train.py --config-file x.yaml {' '.join(named)}"]
    assert f"converted before is there: {'a b.beton' if len(named) > 2 else 'data/cifar10_train.beton'} and c.beton." in output


@pytest.mark.parametrize("answers", [[2], [4, 2], [4, 4, 2], [0, 3], [4, 0, 130]])
def test_any_other_failure_is_the_end(recipe, answers):
    clone = recipe
    status, _, calls = train(clone, answers, "x.yaml")
    assert status == answers[-1] and len(calls) == len(answers)


def setup(folder, path, **environment):
    return subprocess.run(["sh", "scripts/setup.sh"], cwd=folder, text=True, capture_output=True,
                          env={"PATH": path, "HOME": str(folder), "PYTHON": sys.executable, **environment})


@pytest.fixture
def bare(clone):
    """A PATH with the few commands that the script needs, and no compiler, pkg-config or package manager."""
    tools = clone / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "tr", "sed", "id", "env", "rm"):
        [found] = [p for p in (Path(d) / name for d in os.environ["PATH"].split(":")) if p.exists()][:1]
        (tools / name).symlink_to(found)
    return tools


def test_missing_system_packages_are_named_with_status_2(clone, bare):
    done = setup(clone, str(bare))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("missing: compiler, pkg-config", "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev",
                 "dnf install", "brew install", "conda install", "make setup FFCV=no"):
        assert part in done.stderr


def test_without_root_nothing_is_installed(clone, bare):
    (bare / "id").unlink()
    for name, text in (("id", "echo 1000"), ("apt-get", "touch called"), ("sudo", "exit 1")):
        (bare / name).write_text(f"#!/bin/sh\n{text}\n")
        (bare / name).chmod(0o755)
    (bare / "true").symlink_to("/bin/true")
    assert setup(clone, str(bare)).returncode == 2 and not (clone / "called").exists()


def test_no_or_old_python_is_said(clone, bare):
    done = setup(clone, str(bare), PYTHON="python9")
    assert done.returncode == 2 and "python9 is not installed" in done.stderr
    (bare / "python2").write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; -V) echo Python 2.7;; esac\n')
    (bare / "python2").chmod(0o755)
    done = setup(clone, str(bare), PYTHON="python2")
    assert done.returncode == 2 and "Python 2.7 is too old" in done.stderr


@pytest.fixture
def fake_python(clone, bare):
    """An interpreter that notes what pip is asked to install, and makes a .venv with a copy of itself; on the PATH as python3 and python4."""
    text = ('#!/bin/sh\ncase "$*" in\n    *"import sys; print"*) echo 3.13 ;;\n    -c*) exit 0 ;;\n'
            '    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cat "$0" >.venv/bin/python && chmod +x .venv/bin/python ;;\n'
            '    "-m pip"*) [ ! -e offline ] || exit 1; echo "$*" >>installed ;;\n    *) exit 9 ;;\nesac\n')
    for name in ("python3", "python4"):
        (bare / name).write_text(text)
        (bare / name).chmod(0o755)
    for name in ("mkdir", "chmod"):
        (bare / name).symlink_to(shutil.which(name))
    return str(bare)


def test_what_setup_was_given_holds_until_it_is_given_something_else(clone, fake_python):
    """make train after make setup FFCV=no PIP_ARGS=... finds its .venv as it is."""
    def calls(**given):
        (clone / "installed").unlink(missing_ok=True)
        done = setup(clone, fake_python, **{"PYTHON": "", **given})
        assert done.returncode == 0, done.stderr
        assert ("installing" in done.stdout) == (clone / "installed").exists()
        return (clone / "installed").read_text() if (clone / "installed").exists() else ""

    assert "--index x --editable .[test]" in calls(FFCV="no", PIP_ARGS="--index x")
    (clone / "pyproject.toml").write_text((clone / "pyproject.toml").read_text() + "\n")
    (clone / "offline").touch()
    assert setup(clone, fake_python, PYTHON="").returncode != 0
    (clone / "offline").unlink()
    assert "--index x --editable .[test]" in calls(), "where pip failed, what was chosen is forgotten"
    assert calls() == calls(FFCV="no") == calls(PIP_ARGS="--index x", FFCV="no") == ""
    assert "--index y --editable .[test]" in calls(PIP_ARGS="--index y")
    (clone / "pyproject.toml").write_text((clone / "pyproject.toml").read_text() + "\n")
    assert "--index y --editable .[test]" in calls() and calls() == ""
    assert "--index y" not in calls(PIP_ARGS=" ") and calls() == ""
    assert calls(PYTHON="python4") and calls() == "" and "PYTHON=python4\n" in (clone / ".venv/ready").read_text()
    Path(fake_python, "python4").unlink()
    assert calls() and "PYTHON=python3\n" in (clone / ".venv/ready").read_text()
    assert "missing: compiler" in setup(clone, fake_python, FFCV="yes", PYTHON="").stderr


def test_the_make_targets_call_the_scripts():
    def dry(*arguments):
        return subprocess.run(["make", "-n", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout
    assert "sh scripts/train.sh rn_configs/seed_200.yaml --a b" in dry("train", "CONFIG=rn_configs/seed_200.yaml", "ARGS=--a b")
    assert "sh scripts/train.sh rn_configs/se94.yaml" in dry("train") and "sh scripts/setup.sh" in dry("train")
    assert ".venv/bin/python -m pytest" in dry("test") and "sh scripts/setup.sh" in dry("test")
