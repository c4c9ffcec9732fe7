"""Rewrites the texts that tests/test_config.py compares with the recipes. Review their diff and commit it.

    python -m tests.helpers.recipes

It writes `tests/recipes/*.txt`, each frozen recipe of `configs/` as sorted lines `key = value`, and the comments of
`configs/base.py`, which are copies of the meanings in `melt_jax/config.py`.
"""

import importlib
import operator
import pathlib
import re

from melt_jax.config import KEYS, freeze

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXTS = ROOT / "tests" / "recipes"
BASE = ROOT / "configs" / "base.py"
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))
ASSIGNMENT = re.compile(r"^( {4}config\.([\w.]+) = (?:\"[^\"]*\"|\([^()]*\)|[^\"#()]+?))(?:  # .*)?$", re.MULTILINE)


def recipe_text(name: str) -> str:
    """The recipe `configs/{name}.py`, frozen, as sorted lines `key = value`."""
    config = freeze(importlib.import_module(f"configs.{name}").get_config())
    return "".join(f"{key} = {operator.attrgetter(key)(config)!r}\n" for key in sorted(KEYS))


def commented(source: str) -> str:
    """The source of `configs/base.py` with each key's declared meaning as its comment."""

    def comment(match: re.Match[str]) -> str:
        return f"{match[1]}  # {KEYS[match[2]]}" if match[2] in KEYS else match[0]

    return ASSIGNMENT.sub(comment, source)


if __name__ == "__main__":
    TEXTS.mkdir(exist_ok=True)
    for recipe in RECIPES:
        (TEXTS / f"{recipe}.txt").write_text(recipe_text(recipe))
    BASE.write_text(commented(BASE.read_text()))
