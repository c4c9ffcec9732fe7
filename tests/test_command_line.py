"""Recipes and overrides from the command line, and the errors that they report."""

import operator
import pathlib
import sys

import pytest
from absl import flags

from melt_jax import command_line
from melt_jax.command_line import load_config
from melt_jax.config import ConfigError, InputError, freeze

NANO = "configs/nano.py"


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("alignment.beta", "1", 1.0),
        ("alignment.beta", "1e-3", 1e-3),
        ("chunk_size", "16", 16),
        ("data.path", "a=b,c", "a=b,c"),
        ("evaluation.sample", "False", False),
        ("model.bos", "none", None),
        ("phases", "transition,alignment", ("transition", "alignment")),
        ("phases", "('alignment',)", ("alignment",)),
    ],
)
def test_override_has_the_type_of_its_key(key, text, value):
    found = operator.attrgetter(key)(load_config(NANO, [(key, "0"), (key, text)]))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("key, text", [("chunk_size", "1.0"), ("alignment.beta", "x"), ("run.stall_exits", "maybe")])
def test_override_of_another_type_is_kept_for_freeze(key, text):
    with pytest.raises(ConfigError, match=f"{key}: expected .* found '{text}'"):
        freeze(load_config(NANO, [(key, text)]))


def test_override_below_a_key_is_an_error():
    with pytest.raises(ConfigError, match=r"seed.x: unknown key.*\n  - seed: missing"):
        freeze(load_config(NANO, [("seed.x", "3")]))


def test_recipes_accept_an_argument(tmp_path):
    path = recipe(tmp_path, "def get_config(text):\n    return ConfigDict({'text': text})\n")
    assert load_config(f"{path}:a:b").text == "a:b"


def recipe(folder: pathlib.Path, text: str) -> str:
    """A recipe file; returns its path."""
    (folder / "recipe.py").write_text(f"from ml_collections import ConfigDict\n{text}")
    return str(folder / "recipe.py")


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:\n", "line 2: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return sede\n", "line 3: NameError: name 'sede' is not defined"),
        ("def get_config():\n    ConfigDict().lock().a = 1\n", 'line 3: AttributeError: Key "a" does not exist'),
        ("x = 1\n", "AttributeError: module 'melt_jax_recipe' has no attribute 'get_config'"),
        ("def get_config(a):\n    pass\n", "TypeError: get_config() missing 1 required positional argument: 'a'"),
    ],
)
def test_error_in_a_recipe_names_its_line(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(error.value).startswith(f"--config: {path}") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_recipe_must_exist_and_return_a_config(tmp_path):
    with pytest.raises(InputError, match=r"expected a Python file with get_config\(\), found no file 'no.py'"):
        load_config("no.py")
    path = recipe(tmp_path, "def get_config():\n    pass\n")
    with pytest.raises(InputError, match=r"expected a ConfigDict from get_config.* found None"):
        load_config(path)


@pytest.fixture
def parsed(monkeypatch):
    """A function that parses a command line and returns its positional arguments and its overrides."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_multi_string("config.KEY", [], "", flag_values=values)

    def parse(*arguments: str) -> tuple[list[str], list[tuple[str, str]]]:
        rest = command_line._parse_flags(["program", *arguments])
        return rest[1:], command_line.config_overrides()

    return parse


def test_all_forms_of_overrides_are_parsed(parsed):
    rest, overrides = parsed(
        "--config=x.py", "--config.a.b=1=2", "-config.c", "3", "extra", "--config.run.stall_exits",
        "--noconfig.evaluation.sample", "--config.d=", "--", "--config.e=4",
    )  # fmt: skip
    assert rest == ["extra", "--config.e=4"]
    assert overrides == [
        ("a.b", "1=2"), ("c", "3"), ("run.stall_exits", "true"), ("evaluation.sample", "false"), ("d", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.seed"], "--config.seed: expected a value, found none"),
        (["--config.seed", "--config=x"], "--config.seed: expected a value, found none"),
        (["--noconfig.seed"], "--noconfig.seed: expected a key that is true or false"),
        (["--confg=x"], "Unknown command line flag 'confg'"),
    ],
)
def test_flag_errors_are_one_line(parsed, arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        parsed(*arguments)
    assert message in str(end.value.code) and len(str(end.value.code).splitlines()) == 1
