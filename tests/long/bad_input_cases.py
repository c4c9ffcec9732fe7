"""The cases of `tests.long.bad_input`: wrong values, damaged files and contradictions for every command."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np

from melt_jax.config import KEYS

NANO = pathlib.Path("melt_jax/assets/ouro_nano")
HUGE = ("1000000000000000000000000", "-1", "0", "1e300", "nan", "inf", "true", "", "x", "[1]", "１２")


@dataclasses.dataclass(frozen=True)
class Case:
    """One command with bad input.

    Attributes:
      name: what is bad.
      command: module below melt_jax.
      arguments: of the command; `{}` stands for the case's folder.
      make: writes the input into the case's folder.
      refused: words that the message must contain; None: the case may also be accepted.
      environment: variables.
    """

    name: str
    command: str
    arguments: list[str]
    make: Callable[[pathlib.Path], object] = lambda folder: None
    refused: str | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# ---- inputs


def copy_model(folder: pathlib.Path, source: pathlib.Path = NANO) -> pathlib.Path:
    """A copy of a model folder, named `model`."""
    return pathlib.Path(shutil.copytree(source, folder / "model"))


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[pathlib.Path], object]:
    """Copies the model and rewrites a JSON file of it with what `change` returns, or has changed in place."""

    def make(folder):
        path = copy_model(folder) / name
        raw = json.loads(path.read_text())
        changed = change(raw)
        path.write_text(json.dumps(raw if changed is None else changed))

    return make


def with_bytes(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[pathlib.Path], object]:
    """Copies the model and rewrites a file of it; None removes it."""

    def make(folder):
        path = copy_model(folder) / name
        data = change(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)

    return make


def data_file(name: str, content: bytes | str) -> Callable[[pathlib.Path], object]:
    """Writes one file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def flip(data: bytes) -> bytes:
    """Changes one bit."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def safetensors(header: object, rest: bytes = b"") -> bytes:
    """A safetensors file of that header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


# ---- trials


def config_cases() -> Iterator[Case]:
    """Every key with values of a wrong type, size or sign; spellings. The workdir is a file, so no run starts."""
    blocked = ["--config=configs/nano.py", "--workdir={}/file"]
    make = data_file("file", "")
    for key, declared in KEYS.items():
        for value in HUGE:
            refused = None
            if value in ("nan", "inf") or (declared.type in (int, bool) and value in ("x", "[1]", "1e300", "")):
                refused = key if declared.type is not str and "tuple" not in str(declared.type) else None
            yield Case(f"{key}={value}", "train", [*blocked, f"--config.{key}={value}"], make, refused)
        for spelling in (key + "s", key[1:], key.upper(), key.replace("_", "-") + "-", "model." + key):
            if spelling not in KEYS:
                yield Case(spelling, "train", [*blocked, f"--config.{spelling}=1"], make, spelling)
    for path in ("", "/", "configs", "README.md", "melt_jax/config.py", "/dev/null", "configs/nano.py:x", "\0", "é.py"):
        yield Case(f"config {path!r}", "train", [f"--config={path}", "--workdir={}/file"], make, "--config")
    for workdir, words in (("", "--workdir"), (" ", "--workdir"), ("{}/file", "file"), ("{}/file/run", "file")):
        yield Case(f"workdir {workdir!r}", "train", ["--config=configs/nano.py", f"--workdir={workdir}"], make, words)
    sizes = ("layers", "width", "heads", "loops", "vocab", "feed_forward", "head_width", "max_positions")
    for key in sizes:
        for value in (10**6, 2**31 - 1):
            run = ["--config=configs/nano_teacher.py", "--workdir={}/run", f"--config.model.{key}={value}"]
            short = ["--config.pretraining.steps=1", "--config.data.batch=1"]
            refused = None if key in ("max_positions",) else ""
            yield Case(f"model.{key}={value}", "train", [*run, *short], refused=refused)
    for value in (10**6, 2**31 - 1):
        for key in ("data.batch", "data.length", "chunk_size", "micro_batches", "mesh.fsdp", "checkpoints_kept"):
            yield Case(f"{key}={value}", "train", [*blocked, f"--config.{key}={value}"], make)


def folder_cases() -> Iterator[Case]:
    """Published folders: every key of config.json, damaged weights, tokenizer files."""
    generate = ["--checkpoint={}/model", "--prompt=a=4;a?", "--max_new_tokens=2"]
    raw = json.loads((NANO / "config.json").read_text())
    values = (None, "x", -1, 0, 0.5, 10**6, 10**30, 1e300, float("nan"), [], {}, True, "１", "../x")
    for key in raw:
        for value in values:
            yield Case(
                f"{key}: {value!r}",
                "generate",
                generate,
                edit_json("config.json", lambda r, k=key, v=value: r.update({k: v})),
            )
        yield Case(f"no {key}", "generate", generate, edit_json("config.json", lambda r, k=key: r.pop(k) and None))
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        wrong = ("tokenizer.json",) if name == "tokenizer_config.json" else ()
        for what, change in (
            ("empty", lambda data: b""),
            ("missing", lambda data: None),
            ("cut", lambda data: data[: len(data) // 2]),
            ("one byte", lambda data: data[:1]),
            ("a list", lambda data: b"[]"),
            ("a number", lambda data: b"3"),
            ("null", lambda data: b"null"),
            ("text", lambda data: b"not json"),
            ("latin-1", lambda data: "é".encode("latin-1") * 20),
            ("zeros", lambda data: bytes(len(data))),
            ("deep", lambda data: b"[" * 100_000),
            ("object", lambda data: b"{}"),
        ):
            refused = None if wrong and what == "object" else ""
            yield Case(f"{name} {what}", "generate", generate, with_bytes(name, change), refused)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ):
        yield Case(f"{name} is a folder", "generate", generate, lambda folder, name=name: _as_folder(folder, name))
    for what, value in (
        ("list", []),
        ("text", "x"),
        ("eos", {"eos_token_id": "x"}),
        ("big", {"eos_token_id": 10**30}),
        ("nested", {"eos_token_id": [[1]]}),
        ("negative", {"eos_token_id": -5}),
    ):
        make = edit_json("generation_config.json", lambda raw, value=value: value)
        yield Case(f"generation_config {what}", "generate", generate, make)
    headers = {
        "huge length": (2**60).to_bytes(8, "little") + b"{}",
        "length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
        "list": safetensors([]),
        "no offsets": safetensors({"a": {"dtype": "F32", "shape": [1]}}),
        "negative offsets": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)),
        "overlap": safetensors({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        "huge shape": safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)),
        "unknown dtype": safetensors({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "integers": safetensors(
            {"model.norm.weight": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
        ),
        "not UTF-8": safetensors(b'{"\xff": 1}'),
    }
    for what, content in headers.items():
        yield Case(f"header {what}", "generate", generate, with_bytes("model.safetensors", lambda _, c=content: c), "")
    for what, template in (
        ("syntax", "{% for"),
        ("loop", "{% for i in range(10**9) %}{% endfor %}"),
        ("empty", ""),
        ("number", 3),
        ("undefined", "{{ x.y.z }}"),
        ("raise", "{{ raise_exception('no') }}"),
        ("code", "{{ ''.__class__.__mro__ }}"),
        ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    ):
        make = edit_json("tokenizer_config.json", lambda raw, t=template: raw.update(chat_template=t))
        yield Case(f"template {what}", "generate", generate, make)
    for command, words in (
        ("evaluate", ["--checkpoint={}/model"]),
        ("memory", ["--checkpoint={}/model"]),
        ("convert", ["--input={}/model", "--output={}/out", "--to=orbax"]),
    ):
        for name in ("config.json", "model.safetensors"):
            for what, change in (
                ("empty", lambda data: b""),
                ("cut", lambda data: data[:100]),
                ("list", lambda data: b"[]"),
            ):
                refused = None if (command, name) == ("memory", "model.safetensors") else ""
                yield Case(f"{command} {name} {what}", command, words, with_bytes(name, change), refused)


def _as_folder(folder, name):
    path = copy_model(folder) / name
    path.unlink()
    path.mkdir()


def prompt_cases() -> Iterator[Case]:
    """Prompts and flags of generate and memory."""
    base = [f"--checkpoint={NANO}", "--max_new_tokens=2"]
    prompts = (
        "",
        " ",
        "\n",
        "\0",
        "é",
        "<|im_end|>",
        "</think>",
        "a" * 100_000,
        "\ud800",
        "🙂",
        "{{ x }}",
        "\U0010fffd",
    )
    for chat in ("--chat", "--nochat"):
        for prompt in prompts:
            yield Case(f"{chat} {prompt[:20]!r}", "generate", [*base, chat, f"--prompt={prompt}"])
    for name, content in (
        ("empty", ""),
        ("blank", "\n \n"),
        ("latin-1", "é".encode("latin-1")),
        ("zeros", bytes(9)),
        ("bom", "\ufeffa=4;a?"),
        ("utf-16", "a=4;a?".encode("utf-16")),
    ):
        yield Case(f"prompts {name}", "generate", [*base, "--prompts_file={}/p"], data_file("p", content))
    yield Case("prompts folder", "generate", [*base, "--prompts_file={}"], refused="")
    flags_of = {
        "max_new_tokens": ("0", "-1", "1000000000", "10000000000000000000000", "x", ""),
        "temperature": ("-1", "nan", "inf", "1e300", "1e-300", "x"),
        "top_p": ("-1", "0", "2", "nan", "1e-300"),
        "top_k": ("-1", "1000000000", "1000000000000000000000", "0.5"),
        "seed": ("-1", "4294967296", "1000000000000000000000", "x"),
        "prefill_chunk": ("0", "-1", "1000000000", "1000000000000000000000"),
        "loops": ("0", "-1", "1000000000", "1000000000000000000000"),
        "exit_threshold": ("-1", "nan", "inf", "1e300"),
        "guidance": ("-1", "nan", "inf", "1e300"),
        "window": ("-1", "1000000000", "3"),
        "sweeps": ("0", "-1", "1000000000", "3"),
        "gate": ("elementwise", "x", ""),
        "dtype": ("float64", "int8", ""),
        "checkpoint": ("", "/", "/dev/null", "\0", "gs:/x", "~", "x" * 5000),
    }
    for name, found in flags_of.items():
        for value in found:
            yield Case(
                f"--{name}={value[:20]}",
                "generate",
                [f"--checkpoint={NANO}", "--prompt=a=4;a?", "--max_new_tokens=2", f"--{name}={value}"],
            )
    for name in ("length", "loops", "lengths", "windows", "output", "checkpoint"):
        for value in ("0", "-1", "1000000000000000000000000", "x", "", "1,,2", "nan", "{}/no/such/a.png", "a.doc"):
            yield Case(f"memory --{name}={value}", "memory", [f"--{name}={value}"])
    evaluate = {
        "task": ("x", ""),
        "data": ("", "no", "README.md", "/"),
        "problems": ("-1", "1000000000000000000000", "x"),
        "sequences": ("-1", "x"),
        "chunk_size": ("0", "-1"),
        "length": ("0", "-1", "1"),
        "loops": ("0", "x", "1,x"),
        "decoding_tokens": ("-1", "1000000000000000000"),
        "window": ("-1",),
        "dtype": ("x",),
        "seed": ("-1", "x"),
    }
    for name, found in evaluate.items():
        for value in found:
            words = [f"--checkpoint={NANO}", "--problems=1", "--sequences=1", f"--{name}={value}"]
            yield Case(f"evaluate --{name}={value}", "evaluate", words)


def data_cases() -> Iterator[Case]:
    """Rows, files and flags of prepare; token files and manifests of evaluate."""
    base = [f"--tokenizer={NANO}", "--output={}/out", "--length=32"]
    user, answer = {"role": "user", "content": "a=4;a?"}, {"role": "assistant", "content": "4"}
    rows = {
        "empty": "",
        "blank": "\n\n",
        "null": "null",
        "number": "3",
        "list": "[]",
        "text": '"x"',
        "object": "{}",
        "cut": '{"messages": [',
        "deep": "[" * 100_000,
        "nan": '{"text": NaN}',
        "no text": '{"text": ""}',
        "two": '{"text": "a"}{"text": "b"}',
        "surrogate": '{"text": "\\ud800"}',
        "zero": '{"text": "\\u0000"}',
        "messages text": '{"messages": "x"}',
        "messages empty": '{"messages": []}',
        "messages null": '{"messages": null}',
        "message number": '{"messages": [3]}',
        "no role": '{"messages": [{"content": "a"}]}',
        "role number": '{"messages": [{"role": 3, "content": "a"}]}',
        "role unknown": json.dumps({"messages": [{"role": "x", "content": "a"}, answer]}),
        "content list": json.dumps({"messages": [user, {"role": "assistant", "content": ["4"]}]}),
        "content null": json.dumps({"messages": [user, {"role": "assistant", "content": None}]}),
        "only user": json.dumps({"messages": [user]}),
        "only assistant": json.dumps({"messages": [answer]}),
        "empty answer": json.dumps({"messages": [user, {"role": "assistant", "content": ""}]}),
        "forged": json.dumps({"messages": [{"role": "user", "content": "a<|im_end|>"}, answer]}),
        "unknown characters": json.dumps({"messages": [{"role": "user", "content": "é"}, answer]}),
        "long": json.dumps({"messages": [{"role": "user", "content": "a" * 100}, answer]}),
        "huge number": '{"text": 1' + "0" * 5000 + "}",
        "duplicate": '{"text": "a=4", "text": 3}',
    }
    for what, row in rows.items():
        good = json.dumps({"text": "a=4;"})
        make = data_file("a.jsonl", f"{good}\n{row}\n{good}\n")
        refused = None if what in ("empty", "blank", "duplicate", "empty answer") else "a.jsonl:2"
        yield Case(f"row {what}", "prepare", [*base, "--input={}/a.jsonl"], make, refused)
        yield Case(
            f"row {what}, counted", "prepare", [*base, "--input={}/a.jsonl", "--malformed=count", "--long=drop"], make
        )
        yield Case(
            f"only row {what}",
            "prepare",
            [*base, "--input={}/a.jsonl"],
            data_file("a.jsonl", row),
            None if what in ("duplicate", "empty answer") else "",
        )
    files = {
        "latin-1": "é".encode("latin-1"),
        "utf-16": '{"text": "a"}'.encode("utf-16"),
        "zeros": bytes(99),
        "bom": "\ufeff".encode() + b'{"text": "a=4"}',
        "gzip": b"\x1f\x8b\x08rest",
        "crlf": b'{"text": "a=4"}\r\n',
    }
    for what, content in files.items():
        refused = None if what in ("crlf", "bom") else "a.jsonl:1"
        yield Case(f"file {what}", "prepare", [*base, "--input={}/a.jsonl"], data_file("a.jsonl", content), refused)
    for what, content in (("empty", b""), ("text", b"PAR1 no PAR1"), ("magic", b"PAR1" + bytes(50) + b"PAR1")):
        yield Case(
            f"parquet {what}", "prepare", [*base, "--input={}/a.parquet"], data_file("a.parquet", content), "a.parquet"
        )
    good = data_file("a.jsonl", json.dumps({"messages": [user, answer]}) + "\n")
    values = {
        "length": ("0", "1", "-5", "1000000000", "1000000000000000000000000", "x"),
        "threads": ("-1", "1000000", "x"),
        "window": ("0", "-1", "1000000000"),
        "shard_sequences": ("0", "1000000000000000000000"),
        "long": ("x",),
        "malformed": ("",),
        "score": ("x",),
        "question": ("q", ""),
        "answer": ("a",),
        "messages": ("x", ""),
        "text": ("",),
        "input": ("", "|", "{}", "/", "*", "no*", "\0"),
        "tokenizer": ("", "/", "no", "README.md"),
        "output": ("", "/", "{}", "{}/a.jsonl", "{}/a.jsonl/x", "/proc/x"),
        "verify": ("no", "/", "{}", "README.md"),
    }
    for name, found in values.items():
        for value in found:
            words = [
                f"--{key}={v}"
                for key, v in (("tokenizer", NANO), ("input", "{}/a.jsonl"), ("output", "{}/out"))
                if key != name
            ]
            yield Case(
                f"--{name}={value}",
                "prepare",
                [*words, "--length=32", f"--{name}={value}"] if name != "length" else [*words, f"--length={value}"],
                good,
            )
    inside = [f"--tokenizer={NANO}", "--input={}/data/a.jsonl", "--output={}/data", "--length=32", "--overwrite"]
    make = lambda folder: [(folder / "data").mkdir(), good(folder / "data")]
    yield Case("overwrite the input", "prepare", inside, make, "expected an output apart from the inputs")
    evaluate = [f"--checkpoint={NANO}", "--task=tokens", "--sequences=1", "--data={}/data.npz"]
    arrays = {
        "floats": {"tokens": np.zeros((2, 8))},
        "negative": {"tokens": -np.ones((2, 8), int)},
        "empty": {"tokens": np.zeros((0, 8), int)},
        "one dimension": {"tokens": np.zeros(8, int)},
        "three": {"tokens": np.zeros((1, 2, 8), int)},
        "objects": {"tokens": np.array([[{}]])},
        "large ids": {"tokens": np.full((2, 8), 10**9)},
        "no tokens": {"x": np.zeros((2, 8), int)},
        "nothing": {},
        "unscored": {"tokens": np.ones((2, 8), int), "loss_mask": np.zeros((2, 8), int)},
        "mask of another shape": {"tokens": np.ones((2, 8), int), "loss_mask": np.zeros((2, 7), int)},
        "nan mask": {"tokens": np.ones((2, 8), int), "loss_mask": np.full((2, 8), np.nan)},
        "length 1": {"tokens": np.ones((2, 1), int)},
        "too long": {"tokens": np.ones((1, 10**6), np.int8)},
        "text": {"tokens": np.array([["a", "b"]])},
        "complex": {"tokens": np.ones((2, 8), complex)},
        "padding": {"tokens": np.ones((2, 8), int), "segments": np.zeros((2, 8), int)},
    }
    for what, content in arrays.items():
        make = lambda folder, content=content: np.savez(folder / "data.npz", **content)
        yield Case(f"npz {what}", "evaluate", evaluate, make, "data.npz" if what != "too long" else "")
    for what, content in (("empty", b""), ("text", b"x" * 50), ("zip", b"PK\x05\x06" + bytes(18))):
        yield Case(f"npz file {what}", "evaluate", evaluate, data_file("data.npz", content), "data.npz")
    huge = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 100000), }".ljust(
        128
    )
    for what, content in (("empty", b""), ("header", b"\x93NUMPY\x01\x00"), ("huge", huge[:127] + b"\n")):
        words = [*evaluate[:-1], "--data={}/a.npy", "--length=8"]
        yield Case(f"npy {what}", "evaluate", words, data_file("a.npy", content), "a.npy")


def other_cases() -> Iterator[Case]:
    """Environment, convert, plot, compile, and run files."""
    run = ["--config=configs/nano.py", "--workdir={}/file"]
    for name, value in (
        ("MELT_COORDINATOR", "x"),
        ("MELT_PROCESS", "3"),
        ("MELT_PROCESSES", "0"),
        ("MELT_PROCESSES", "x"),
    ):
        yield Case(f"{name}={value}", "train", run, data_file("file", ""), name, {name: value})
    for value in ("h", "h:", ":1", "h:x", "h:99999999", "h:1:2", "\n:1"):
        variables = {"MELT_COORDINATOR": value, "MELT_PROCESSES": "2", "MELT_PROCESS": "1"}
        yield Case(f"coordinator {value!r}", "train", run, data_file("file", ""), "MELT_COORDINATOR", variables)
    convert = {
        "input": ("", "/", "no", "README.md"),
        "output": ("", "/", f"{NANO}", "/proc/x", "{}/file/x"),
        "to": ("x", ""),
        "gate": ("x", "elementwise", ""),
        "first_loop": ("gated", "x"),
        "dtype": ("int8",),
        "seed": ("-1", "x", "99999999999999999999"),
    }
    for name, found in convert.items():
        for value in found:
            words = [
                f"--{key}={v}" for key, v in (("input", NANO), ("output", "{}/out"), ("to", "orbax")) if key != name
            ]
            yield Case(f"convert --{name}={value}", "convert", [*words, f"--{name}={value}"], data_file("file", ""))
    replace = [f"--input={NANO}", "--output={}/x", "--to=orbax", "--overwrite"]
    make = lambda folder: [(folder / "x").mkdir(), (folder / "x/thesis").write_text("")]
    yield Case("overwrite a foreign folder", "convert", replace, make, "digests.json")
    config = {"phases": ["transition"], "transition": {"steps": 3}}
    logs = {
        "empty": "",
        "cut": '{"step": 1, "lo',
        "list": "[]\n",
        "text": '{"step": "x"}\n',
        "number": "3\n",
        "no step": '{"loss": 3}\n',
        "null": '{"step": null, "loss": 1}\n',
        "nan": '{"step": 1, "loss": NaN}\n',
        "binary": b"\xff\xfe\n",
        "deep": "[" * 100_000 + "\n",
        "huge": '{"step": 1e999, "loss": 1e999}\n',
    }
    for what, log in logs.items():
        for gates in ([], ["--gates"]):
            words = ["--workdir={}/run", "--output={}/a.png", *gates]
            yield Case(
                f"plot log {what} {gates}", "plot", words, lambda folder, log=log: _write_run(folder, config, log)
            )
    for what, value in (
        ("list", []),
        ("no phases", {}),
        ("phases", {"phases": 3}),
        ("strange", {"phases": ["x"]}),
        ("phase", {"phases": ["transition"], "transition": 3}),
        ("nested", {"phases": [["a"]]}),
        ("null", None),
    ):
        words = ["--workdir={}/run", "--output={}/a.png"]
        yield Case(f"plot config {what}", "plot", words, lambda folder, value=value: _write_run(folder, value, ""), "")
        run = ["--config=configs/nano.py", "--workdir={}/run"]
        yield Case(f"train config {what}", "train", run, lambda folder, value=value: _write_run(folder, value, ""), "")
    for name in ("config.json", "results.json", "attempts/0001.json"):
        for content in (b"", b"[", b"3", b"\xff", b"{}", b"null"):
            if name == "config.json":
                run = ["--config=configs/nano.py", "--workdir={}/run"]
                yield Case(
                    f"{name} {content!r}",
                    "train",
                    run,
                    lambda folder, n=name, c=content: _run_file(folder, n, c),
                    "config.json" if content != b"{}" else "",
                )
    for value in ("", "x", "v5e", "v5e:0x0", "v5e:-1x2", "v5e:1000x1000", "v99:2x2", "v5e:2x2x2x2", "v5e:ax2"):
        yield Case(f"topology {value}", "compile", ["--config=configs/nano.py", f"--topology={value}"], refused="")
    for command in ("train", "prepare", "convert", "generate", "evaluate", "compile", "memory", "plot"):
        for words in (
            ["--no_such_flag"],
            ["extra"],
            ["--"],
            ["--flagfile=no"],
            ["--undefok=x", "--x=1"],
            ["-"],
            ["--=3"],
            [""],
        ):
            yield Case(f"{command} {words}", command, words, refused="" if command != "memory" else None)


def _write_run(folder, config, log):
    (folder / "run/transition").mkdir(parents=True)
    (folder / "run/config.json").write_text(json.dumps(config))
    (folder / "run/transition/metrics.jsonl").write_bytes(log if isinstance(log, bytes) else log.encode())


def _run_file(folder, name, content):
    path = folder / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


TRIALS = {
    "config": config_cases,
    "folders": folder_cases,
    "prompts": prompt_cases,
    "data": data_cases,
    "others": other_cases,
}
