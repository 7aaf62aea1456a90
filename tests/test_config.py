"""config: what is not understood is refused, all of it at once, with the key, the value and the way out."""
import argparse
import dataclasses
import re
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seresnet import config, runtime
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
    ("optim.lr", 1e-300, "number > 0"), ("optim.lr", 1e31, "number > 0"), ("run.device", "cuda:100", "like auto"),
    ("run.seed", 2**63, "integer >= 0"), ("loop.epochs", 10**6 + 1, "<= 1000000"), ("run.folder", "a\0b", "printable text"), ("model.channels", [10**6], "<= 65536"),
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


def test_second_passes_are_counted_over_a_run_and_its_parts():
    optim = build({"optim.sam_radius": 0.1, "optim.sam_from": 0.6, "optim.sam_share": 0.5}).optim
    assert optim.passes() == pytest.approx(1.2) and optim.passes(0.0, 0.5) == 1 and optim.passes(0.5, 0.7) == pytest.approx(1.25)
    assert optim.passes(0.8, 0.9) == 1.5 and build({"optim.sam_from": 0.6}).optim.passes() == 1


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


@pytest.mark.parametrize("name, value, told", [
    ("run.seed", 2**63, "integer >= 0, 9223372036854775807 at most"), ("run.seed", "9" * 30, "integer >= 0, 9223372036854775807 at most"),
    ("run.seed", 10**400, "integer >= 0, 9223372036854775807 at most"), ("run.seed", -1, "integer >= 0"), ("run.seed", "x", "integer >= 0"),
    ("loop.epochs", 2**70, "integer >= 1 and <= 1000000"), ("optim.lr", 1e-300, "number > 0, 1e-15 at least in size"),
    ("optim.lr", "1e400", "number > 0, 1e+30 at most"), ("optim.lr", -1, "number > 0"), ("optim.weight_decay", 1e300, "number >= 0 and <= 10000.0"),
    ("optim.betas", [0.9, 1e-20], "list of number >= 0 and < 1, 2 of them, 0 or 1e-15 at least in size"),
    ("optim.betas", "0.9,1e-20", "list of number >= 0 and < 1, 2 of them, 0 or 1e-15 at least in size"),
    ("optim.betas", "0.9,2", "list of number >= 0 and < 1, 2 of them")])
def test_a_number_that_no_key_takes_is_told_its_bounds(name, value, told):
    found = problems({name: value})
    assert len(found) == 1 and found[0].endswith(f"expected {told}"), found


@pytest.mark.parametrize("values, part", [
    ({"optim.clip_norm": 1, "optim.clip_value": 1}, "one kind of clipping"),
    ({"optim.warmup_epochs": 300}, "at most loop.epochs = 200"),
    ({"optim.schedule": "step"}, "optim.milestones"),
    ({"optim.schedule": "step", "optim.milestones": [5, 200]}, "below loop.epochs"),
    ({"augment.translate": 32}, "less than model.image_size"), ({"augment.cutout": 40}, "less than model.image_size"),
    ({"augment.sides": [8, 32], "augment.cutout": 8}, "less than the least of augment.sides = 8"),
    ({"model.blocks": []}, "expected list of integer >= 0 and <= 1000, 1 to 8 of them"), ({"optim.betas": [0.9]}, "number >= 0 and < 1, 2 of them"),
    ({"model.channels": [1, 2]}, "model.channels: got 2 entries, expected 1 or, as model.blocks has, 3"),
    ({"model.kernels": [4]}, "model.kernels: got an even number"),
    ({"evaluate.split": "holdout", "evaluate.holdout_size": 5001}, "multiple of model.classes"),
    ({"beton.train": "x", "beton.test": "./x"}, "expected two files"),
    ({"sources.kind": "digits", "sources.path": "mine"}, "got mine and digits, which scikit-learn brings along"), ({"model.blocks": [1000, 1]}, "got 2,002 convolutions"),
])
def test_contradictions_are_refused(values, part):
    found = problems(values)
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize("text, part", [
    ("- a\n- b\n", "holds a list, expected sections"), ("just words", "holds a str"),
    ("a: [1, 2", "is no YAML"), ("optim: {lr: 1}\noptim: {lr: 2}\n", "written twice"),
    ("x: !!python/object/apply:os.system ['true']", "is no YAML"), ("? [a]\n: 1\n", "is no YAML"),
    ("a: &a [*a]\n", "the alias *a: write the values out"), ("[" * 3000, "is no YAML"),
    ("a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{x: *{'a' if i == 0 else f'b{i - 1}'}}}\n" for i in range(40)), "the alias"),
    ("x: !!python/name:os.system\n", "is no YAML"), ("x: !!binary aGVsbG8=\n", "no such key"), ("optim: {lr: 1e400}\n", "number > 0"),
    ("run: {seed: !!bool maybe}\n", "is no YAML"), ("run: {seed: !!int ''}\n", "is no YAML"), ("run: {seed: !!timestamp x}\n", "is no YAML"),
    ("loop: {epochs: 0x" + "f" * 5000 + "}\n", "got a number of 20000 bits (int), expected integer"),
    ("run: {folder: 'a\\0b'}\n".replace("'", '"'), "expected printable text"), ("run: {seed: " + "9" * 30 + "}\n", "integer >= 0"),
    ('"a\\nb": 1\n', "'a\\nb': there is no such key"), ("run: {folder: " + "x" * 5000 + ", seed: " + "y" * 5000 + "}\n", "characters)"),
    ("#" * (1 << 20) + "\n", "has more than 1,048,576 bytes"),
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


@pytest.mark.parametrize("asked, meant", [("--optim.learning_rate", "optim.lr"), ("--loop.num_epochs", "loop.epochs")])
def test_names_of_other_programs_are_known(asked, meant):
    with pytest.raises(ConfigError, match=f"{asked}: there is no such key: did you mean --{meant}?"):
        parse([asked, "3"])


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


def valid(name):
    """Values of the key `name` that are allowed by its type and limits."""
    section, key = name.split(".")
    field, = (f for f in dataclasses.fields(config.SECTIONS[section]) if f.name == key)
    hint, limits = typing.get_type_hints(config.SECTIONS[section])[key], field.metadata["limits"]
    is_list = typing.get_origin(hint) is list
    kind = typing.get_args(hint)[0] if is_list else hint
    if limits["one_of"]:
        one = st.sampled_from(limits["one_of"])
    elif kind is bool:
        one = st.booleans() | st.sampled_from(["true", "False", "0", "yes"])
    elif kind is int:
        low, high = limits["at_least"] or 0, limits["at_most"] or 2**63 - 1
        one = st.integers(low, min(high, 9)) | st.integers(low, high) | st.integers(low, high).map(str)
    elif kind is float:
        low = limits["at_least"] if limits["at_least"] is not None else limits["above"] or 0
        one = st.floats(low, limits["below"] or limits["at_most"] or 1e30, exclude_min=limits["above"] is not None,
                        exclude_max=limits["below"] is not None).filter(lambda v: v == 0 or v >= 1e-15)
    else:
        one = st.sampled_from(["auto", "cpu", "mps", "cuda:99"] if limits["pattern"] else ["a", "b/c", "", "../d", "e f"])
    if not is_list:
        return one
    lengths = [length for length in limits["lengths"] or range(3) if length < 4]
    return st.sampled_from(lengths).flatmap(lambda length: st.lists(one, min_size=length, max_size=length))


def mappings(values, most=5):
    return st.lists(st.sampled_from(KEYS), max_size=most, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: values(name) for name in names}))


@settings(max_examples=150, deadline=None)
@given(mappings(valid))
def test_right_values_build_or_contradict_each_other(mapping):
    try:
        built = build(mapping)
    except ConfigError as error:
        assert all("there is no such key" not in line and not re.search(r": got .* [(]\w+[)], expected", line) for line in error.problems)
    else:
        assert build(built.as_dict()) == built


WORDS = st.sampled_from([*(f"--{name}" for name in KEYS[:40]), "--config-file", "-C", "--", "-", "=", "--run", "/dev/null", "/dev/zero", "."]
                        ) | st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=6), text=st.text(max_size=40) | st.binary(max_size=40))
def test_no_command_line_and_no_file_ends_in_a_traceback(tmp_path, capsys, words, text):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))

    def main():
        parse([*words, "--config-file", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as caught:
        runtime.run_program(main)
    errors = capsys.readouterr().err
    assert caught.value.code in (0, 2) and (errors == "") == (caught.value.code == 0)
    assert "Traceback" not in errors and all(line.startswith("error: ") for line in errors.split("\n") if line)
