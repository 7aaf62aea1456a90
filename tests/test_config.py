"""config: what is not understood is refused, all of it at once, with the key, the value and the way out."""
import argparse
import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seresnet import config
from seresnet.config import ConfigError, build, parse


def problems(*layers):
    with pytest.raises(ConfigError) as caught:
        build(*layers)
    return list(caught.value.problems)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_defaults_pass_their_own_checks_and_round_trip_through_yaml():
    defaults = build()
    assert build(yaml.safe_load(yaml.safe_dump(defaults.as_dict()))) == defaults


def test_precedence_is_defaults_then_files_in_order_then_command_line(tmp_path, monkeypatch):
    first = write(tmp_path / "a.yaml", "optim:\n  lr: 0.2\n  momentum: 0.8\nloop: {epochs: 3}\n")
    second = write(tmp_path / "b.yaml", "optim.momentum: 0.7\n")
    monkeypatch.setenv("optim.lr", "99")
    got, _ = parse(["-C", first, "--config-file", second, "--loop.epochs=5", "--run.seed", "7"])
    assert (got.optim.lr, got.optim.momentum, got.loop.epochs, got.run.seed) == (0.2, 0.7, 5, 7)
    assert got.recipe == "b"


@pytest.mark.parametrize("name, given, value", [
    ("run.compile", "False", False), ("run.compile", "0", False), ("run.compile", "off", False),
    ("run.compile", "True", True), ("run.compile", True, True), ("run.compile", "yes", True),
    ("loop.epochs", 3, 3), ("loop.epochs", "3", 3), ("loop.epochs", "1_000", 1000),
    ("optim.lr", "5e-4", 5e-4), ("optim.lr", 1, 1.0), ("optim.lr", ".5", 0.5),
    ("model.blocks", "1,2,3", (1, 2, 3)), ("model.blocks", "[1, 2]", (1, 2)), ("model.blocks", [4], (4,)),
    ("model.channels", 32, (32,)), ("optim.milestones", [], ()), ("run.device", "cuda:1", "cuda:1"),
    ("run.folder", "", ""),
])
def test_values_that_are_understood(name, given, value):
    section, key = name.split(".")
    got = getattr(getattr(build({name: given}), section), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("name, given, expected", [
    ("run.compile", "maybe", "true or false"), ("run.compile", 2, "true or false"), ("run.compile", "", "true or false"),
    ("loop.epochs", 2.9, "integer >= 1"), ("loop.epochs", "2.0", "integer >= 1"), ("loop.epochs", True, "integer"),
    ("loop.epochs", 0, "integer >= 1"), ("loop.epochs", "many", "integer"), ("loop.epochs", [3], "integer"),
    ("optim.lr", 0, "number > 0"), ("optim.lr", "nan", "number"), ("optim.lr", float("inf"), "number"),
    ("optim.lr", False, "number"), ("loss.label_smoothing", 1.0, "number >= 0 and < 1"),
    ("model.blocks", [], "list of integer"), ("model.blocks", "1,x", "list of integer"),
    ("model.blocks", [1] * 9, "list"), ("optim.betas", [0.9], "list of number"),
    ("run.device", "gpu", "like auto"), ("sources.path", 3, "text"), ("optim.name", "SGD", "one of sgd, adamw"),
    ("model", 3, "no such key"), ("model.blocks", {"a": 1}, "no such key"),
])
def test_values_that_are_refused(name, given, expected):
    found = problems({name: given})
    assert len(found) == 1 and name.split(".")[-1] in found[0] and expected in found[0]


def test_null_is_no_value():
    assert problems({"optim": {"lr": None}}) == [
        "optim.lr: has no value, expected number > 0: give one, or leave the key out for its default"]
    assert build({"optim": None}) == build()    # a section all of whose keys are commented out


@pytest.mark.parametrize("name, suggestion", [
    ("optim.lrr", "optim.lr"), ("optim.learning_rate_schedule", "optim.schedule"), ("batch_size", "batch_size"),
    ("model.batch_size", "batch_size"), ("modle.blocks", "model.blocks"), ("augment.flips", "augment.flip"),
    ("evaluate.tta_", "evaluate.tta"),
])
def test_unknown_keys_are_refused_with_the_nearest(name, suggestion):
    found = problems({name: 1})
    assert len(found) == 1 and found[0].startswith(f"{name}: there is no such key")
    if name != "optim.learning_rate_schedule":
        assert f"{suggestion}?" in found[0]


def test_all_problems_come_at_once(tmp_path):
    path = write(tmp_path / "bad.yaml", "optim: {lr: fast, nesterof: true}\nloop: {epochs: -1}\n")
    with pytest.raises(ConfigError) as caught:
        parse(["-C", path, "-C", str(tmp_path / "missing.yaml"), "--augment.flip", "randon", "stray", "--model.se"])
    text = str(caught.value)
    for part in ("missing.yaml: No such file", "optim.lr: got 'fast' (str)", "did you mean optim.nesterov?",
                 "loop.epochs: got -1", "did you mean random?", "stray: stands alone", "--model.se: has no value"):
        assert part in text, part
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize("values, part", [
    ({"optim.clip_norm": 1, "optim.clip_value": 1}, "one kind of clipping"),
    ({"optim.warmup_epochs": 300}, "at most loop.epochs = 200"),
    ({"optim.schedule": "step"}, "optim.milestones"),
    ({"optim.schedule": "step", "optim.milestones": [5, 200]}, "below loop.epochs"),
    ({"augment.translate": 32}, "less than model.image_size"), ({"augment.cutout": 40}, "less than model.image_size"),
    ({"model.channels": [1, 2]}, "model.channels: got 2 entries, expected 1 or, as model.blocks has, 3"),
    ({"model.kernels": [4]}, "model.kernels: got an even number"),
    ({"evaluate.split": "holdout", "evaluate.holdout_size": 5001}, "multiple of model.classes"),
    ({"beton.train": "x", "beton.test": "./x"}, "expected two files"),
])
def test_contradictions_are_refused(values, part):
    found = problems(values)
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize("text, part", [
    ("- a\n- b\n", "holds a list, expected sections"), ("just words", "holds a str"),
    ("a: [1, 2", "is no YAML"), ("optim: {lr: 1}\noptim: {lr: 2}\n", "written twice"),
    ("x: !!python/object/apply:os.system ['true']", "is no YAML"), ("? [a]\n: 1\n", "is no YAML"),
    ("a: &a [*a]\n", None), ("[" * 3000, "is no YAML"),
])
def test_files_that_are_no_configuration(tmp_path, text, part):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        parse(["-C", path])
    assert part is None or part in str(caught.value)


def test_binary_and_directory_as_files(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for path, part in ((tmp_path / "b.yaml", "is no UTF-8 text"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=part):
            parse(["-C", str(path)])


def test_json_files_are_read_too(tmp_path):
    assert parse(["-C", write(tmp_path / "c.json", '{"optim": {"lr": 0.25}}')])[0].optim.lr == 0.25


def test_prefixes_of_options_are_not_accepted():
    with pytest.raises(ConfigError, match="--loop.epoch: there is no such key: did you mean --loop.epochs?"):
        parse(["--loop.epoch", "3"])


def test_a_programs_own_options_stand_beside_the_keys():
    parser = argparse.ArgumentParser()
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    got, own = parse(["--force", "--loop.epochs", "2", "--repeat", "5"], parser)
    assert (got.loop.epochs, own.force, own.repeat) == (2, True, 5)
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int)
    with pytest.raises(ConfigError, match="--repeat"):
        parse(["--repeat", "often"], parser)


def test_help_lists_every_key_with_default_and_a_line(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, section in config.SECTIONS.items():
        for field in dataclasses.fields(section):
            assert f"  {name}.{field.name}  [" in text and field.metadata["help"] in text
            assert len(field.metadata["help"]) <= 100 and "\n" not in field.metadata["help"]


KEYS = [f"{name}.{f.name}" for name, section in config.SECTIONS.items() for f in dataclasses.fields(section)]
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                   max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), ANY, max_size=4))
def test_any_mapping_builds_or_ends_in_the_one_error(mapping):
    try:
        built = build(mapping)
    except ConfigError as error:
        assert error.problems and all(error.problems)
    else:
        assert build(built.as_dict()) == built


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=20).filter(lambda n: n not in KEYS))
def test_any_unknown_key_is_refused(name):
    if name not in config.SECTIONS:
        assert any("there is no such key" in problem for problem in problems({name: 1}))
