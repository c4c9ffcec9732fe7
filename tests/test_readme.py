"""Every fenced block of the READMEs runs, and every command, flag, config key, path and module in them exists."""

import ast
import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from configs import base

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("configs", "launch", "melt_jax", "tests")
READMES = (
    "README.md",
    *sorted(
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("README.md")
        if "golden" not in path.parts
    ),
)
SLOW = ("README.md", "melt_jax/data/README.md")  # their blocks generate, differentiate or train
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INTERPRETERS = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-"]}
# A module imports only from its own or a lower layer. Top-level modules that are not listed are commands.
LAYERS = {
    "config": 0, "config_keys": 0, "digests": 0, "files": 0, "model": 1, "data": 2, "checkpoints": 2, "sharding": 2,
    "training": 3, "inference": 3, "analysis": 3, "command_line": 3,
}  # fmt: skip
COMMAND_LAYER = 4


def fenced_blocks(readme):
    """[(language, source)] of a README."""
    return FENCE.findall((ROOT / readme).read_text())


@functools.cache
def outside_blocks(readme):
    """A README's text without its fenced blocks."""
    return FENCE.sub("", (ROOT / readme).read_text())


def indented_lines(readme):
    """The lines of a README's indented blocks, with continuation lines joined."""
    text = outside_blocks(readme).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def code_spans(readme):
    """The inline code of a README."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside_blocks(readme))]


def commands(readme):
    """Every command line that a README shows, in any kind of block or in inline code."""
    scripts = [source for language, source in fenced_blocks(readme) if language == "sh"]
    lines = [line.strip() for source in scripts for line in source.replace("\\\n", " ").splitlines()]
    candidates = [*lines, *indented_lines(readme), *code_spans(readme)]
    return [line for line in candidates if re.search(r"(^|\s)(python3? |launch/\S+\.(sh|sbatch) )", line)]


@functools.cache
def declared_flags(source):
    """The flags that a command's source file declares, with absl or argparse.

    A flag is the constant first argument of `DEFINE_…`, of `add_argument`, or of any call within `define_flags`.
    """
    tree = ast.parse(source.read_text())
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
    declaring = [call for call in calls if re.match("DEFINE_|add_argument", callee(call))]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "define_flags":
            declaring += [call for call in ast.walk(function) if isinstance(call, ast.Call)]
    first = [call.args[0].value for call in declaring if call.args and isinstance(call.args[0], ast.Constant)]
    names = {name.lstrip("-") for name in first if isinstance(name, str)} | {"help"}
    if any(callee(call) == "define_config_flag" for call in calls):
        names.add("config")
    if any(callee(call) == "define_model_flags" for call in calls):
        names |= declared_flags(ROOT / "melt_jax/inference/loading.py")
    return names | {f"no{name}" for name in names}


def callee(call):
    """The last part of the name of a called function."""
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def command_source(line):
    """The source file of the Python command on a line, or None."""
    if module := re.search(r"python3? -m ([\w.]+)", line):
        name = module[1].replace(".", "/")
        return ROOT / f"{name}.py"
    if script := re.search(r"python3? ((?:launch|tests)/\S+\.py)", line):
        return ROOT / script[1]
    return None


def config_has(key):
    """Whether the base configuration has a key or a group of that name."""
    value = base.get_config()
    for name in key.split("."):
        if not hasattr(value, "keys") or name not in value:
            return False
        value = value[name]
    return True


def run_block(language, source, folder):
    """Runs one block in a folder like the repository, with the test's interpreter as `python`."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    if not (tools / "python").exists():
        (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (tools / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "PYTHON_RUN": sys.executable,
    }
    return subprocess.run(
        INTERPRETERS[language], input=source, cwd=folder, env=environment, capture_output=True, text=True
    )


def repository_copy(folder):
    """Fills a folder with links to the folders of the repository; returns it."""
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize(
    "readme", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in READMES]
)
def test_fenced_blocks_run(readme, tmp_path):
    """A README's blocks run in order in one folder; a block in any language but sh and python fails."""
    folder = repository_copy(tmp_path)
    for language, source in fenced_blocks(readme):
        assert language in INTERPRETERS, f"{readme}: expected a block of {sorted(INTERPRETERS)}, found {language!r}"
        done = run_block(language, source, folder)
        assert done.returncode == 0, f"{readme}:\n{source}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if readme == "melt_jax/data/README.md":
        check_prepared_and_trained(folder)


def check_prepared_and_trained(folder):
    """The example of the data README writes 200 documents and trains 6 + 4 steps."""
    manifest = json.loads((folder / "data/few/manifest.json").read_text())
    assert manifest["counts"]["documents"] == 200 and manifest["counts"]["malformed"] == 0
    logs = [(folder / "runs/few" / phase / "metrics.jsonl").read_text() for phase in ("transition", "alignment")]
    assert [json.loads(log.splitlines()[-1])["step"] for log in logs] == [6, 4]
    assert (folder / "runs/few/alignment/model").is_dir()


@pytest.mark.parametrize("readme", READMES)
def test_fences_are_closed(readme):
    """Otherwise test_fenced_blocks_run would miss a block whose fence is unclosed or indented."""
    text = (ROOT / readme).read_text()
    assert text.count("```") == 2 * len(fenced_blocks(readme))
    assert "~~~" not in text


@pytest.mark.parametrize("readme", READMES)
def test_commands_and_flags_exist(readme):
    """Every module, script, flag and `--config.key` of every command exists."""
    for line in commands(readme):
        source = command_source(line)
        if source is not None:
            assert source.is_file(), f"{readme}: {line}: no {source.relative_to(ROOT)}"
        for flag in re.findall(r"\s--([\w.]+)", line):
            if flag.startswith("config."):
                continue  # checked by test_config_keys_exist
            if source is not None:
                known = declared_flags(source)
            elif "launch/local_processes.sh" in line or "launch/tpu" in line or "launch/slurm" in line:
                known = declared_flags(ROOT / "melt_jax/train.py")
            else:
                continue
            assert flag in known, f"{readme}: {line}: no flag --{flag}"


def test_flags_mentioned_alone_exist():
    """A flag in inline code without its command belongs to some command."""
    sources = [*ROOT.glob("melt_jax/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("tests/long/*.py")]
    known = set().union(*(declared_flags(source) for source in sources))
    for readme in READMES:
        mentioned = {match[1] for span in code_spans(readme) if (match := re.fullmatch(r"--(\w+)(=\S*)?", span))}
        assert not (missing := mentioned - known), f"{readme}: {missing}"


@pytest.mark.parametrize("readme", READMES)
def test_config_keys_exist(readme):
    """Every `--config.key`, and every `group.key` in inline code, is a key of `configs/base.py`."""
    text = (ROOT / readme).read_text()
    keys = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)*)", text))
    groups = {name for name, value in base.get_config().items() if hasattr(value, "keys")}
    for span in code_spans(readme):
        for word in span.split():
            key = word.partition("=")[0]
            is_key = re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)*", key) and not word.endswith((".py", ".jsonl"))
            if is_key and key.partition(".")[0] in groups and "." in key:
                keys.add(key)
    assert not (missing := {key for key in keys if not config_has(key)}), f"{readme}: {missing}"


@pytest.mark.parametrize("readme", READMES)
def test_paths_and_links_exist(readme):
    """Every path into the repository and every relative link leads to a file or folder."""
    text = (ROOT / readme).read_text()
    paths = re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", outside_blocks(readme))
    missing = [path for path in paths if not (ROOT / path).exists()]
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not ((ROOT / readme).parent / target).exists():
            missing.append(target)
    modules = [span for span in code_spans(readme) if re.fullmatch(r"(melt_jax|tests)(\.\w+)+", span)]
    missing += [name for name in modules if not list(ROOT.glob(name.replace(".", "/") + "*"))]
    assert not missing, f"{readme}: {missing}"


def test_root_readme_is_short():
    """It is the page for newcomers: at most 9 kB."""
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


def test_every_file_is_described():
    """A folder's README names each of its recipes, scripts and modules."""
    for readme, pattern in (
        ("configs/README.md", "configs/*.py"),
        ("launch/README.md", "launch/*"),
        ("melt_jax/README.md", "melt_jax/*.py"),
        ("melt_jax/README.md", "melt_jax/[!d_]*/*.py"),
        ("melt_jax/data/README.md", "melt_jax/data/*.py"),
    ):
        text = (ROOT / readme).read_text()
        names = [path.name for path in ROOT.glob(pattern) if path.is_file() and path.name[0] not in "_."]
        mentioned = {name for name in names if re.search(rf"(?<!\w){re.escape(name)}", text)}
        assert names and not (missing := {*names} - mentioned - {"README.md"}), f"{readme}: {missing}"


def test_imports_go_one_way():
    """No module imports a command or a module of a higher layer; melt_jax/README.md describes the layers."""
    for path in (ROOT / "melt_jax").rglob("*.py"):
        parts = path.relative_to(ROOT / "melt_jax").with_suffix("").parts
        if parts == ("__init__",):
            continue
        layer = LAYERS.get(parts[0], COMMAND_LAYER)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("melt_jax."):
                imported = node.module.split(".")[1]
                assert imported in LAYERS, f"{path}: imports the command {imported}"
                assert LAYERS[imported] <= layer, f"{path}: imports {node.module} of a higher layer"
