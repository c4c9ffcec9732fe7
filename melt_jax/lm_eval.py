"""Evaluates a model folder on tasks of lm-evaluation-harness.

    pip install -e '.[eval]'
    python -m melt_jax.lm_eval --model_args=checkpoint=MELT-1.6B,batch_size=32 --tasks=arc_easy,wikitext
    python -m melt_jax.lm_eval --model_args=checkpoint=DIR,window=8 --tasks=my_task --include_path=FOLDER --limit=10

--model_args takes the fields of `melt_jax.inference.harness.HarnessSettings` and of
`melt_jax.inference.loading.ModelChanges`, and the mesh axes replica, fsdp and tensor (arXiv 2605.07721 and 2510.25741
explain loops, window and exit threshold). The other flags are the harness's; it downloads the tasks' data. One process
runs the evaluation, on one device or on a mesh of its devices.
"""

import dataclasses
import json
import os
import types
import typing
from typing import Any

from absl import flags

from melt_jax import command_line
from melt_jax.config import CHOICES, GATES, InputError, MeshConfig
from melt_jax.files import as_path, folder_on_disk, in_bucket
from melt_jax.inference.loading import ModelChanges

FLAGS = flags.FLAGS
AXES = ("replica", "fsdp", "tensor")


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("model_args", None, "checkpoint=DIR and other settings, as in a=1,b=2.", required=True)
    flags.DEFINE_list("tasks", None, "Names of tasks or groups, or YAML files, separated by commas.", required=True)
    flags.DEFINE_string("include_path", None, "A folder of further task files.")
    flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt. Default: the task's.")
    flags.DEFINE_float("limit", None, "Evaluate so many examples of a task, or below 1 this fraction.")
    flags.DEFINE_string("samples", None, 'Examples to evaluate by index, as JSON: {"task": [0, 3]}.')
    flags.DEFINE_integer(
        "repeats", None, "Answers sampled for each prompt. Default: the task's. The task must score all of them."
    )
    flags.DEFINE_string(
        "gen_kwargs", None, "Replaces a task's generation_kwargs: do_sample=true,temperature=1, or JSON."
    )
    flags.DEFINE_boolean("apply_chat_template", False, "Put prompts into the checkpoint's chat template.")
    flags.DEFINE_string("system_instruction", None, "System prompt.")
    flags.DEFINE_string(
        "use_cache",
        None,
        "Folder of answers. A command that was interrupted resumes from it; another model or setting has its own file.",
    )
    flags.DEFINE_string("output_path", None, "Folder to which results are written, as JSON.")
    flags.DEFINE_boolean("log_samples", False, "Also write every prompt and answer to --output_path.")


def main(argv: list[str]) -> None:
    """Reads the flags, evaluates and prints the harness's tables."""
    del argv
    if FLAGS.log_samples and not FLAGS.output_path:
        raise InputError("--output_path: expected a folder with --log_samples, found none")
    results = evaluate()
    from lm_eval.utils import make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def evaluate() -> dict[str, Any]:
    """Runs the harness as the flags say; returns its results.

    Raises:
      InputError: lm_eval is not installed, or a flag, a task or the checkpoint cannot be used.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the harness forks; the tokenizer would warn
    try:
        from lm_eval.evaluator import simple_evaluate
    except ModuleNotFoundError as error:
        raise InputError(
            f"lm_eval: expected lm-evaluation-harness, found no package {error.name}; run pip install -e '.[eval]' in"
            " the repository"
        ) from error
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import simple_parse_args_string

    from melt_jax.inference.harness import HarnessModel, HarnessSettings

    if FLAGS.limit is not None and FLAGS.limit <= 0:
        raise InputError(f"--limit: expected more than 0, found {FLAGS.limit:g}")
    if FLAGS.limit is not None and FLAGS.samples is not None:
        raise InputError("--limit, --samples: expected one of them, found both")
    if FLAGS.repeats is not None and FLAGS.repeats < 1:
        raise InputError(f"--repeats: expected at least 1, found {FLAGS.repeats}")
    for name in ("include_path", "use_cache"):
        if in_bucket(as_path(FLAGS[name].value or ".")):
            raise InputError(
                f"--{name}: expected a folder on a disk, which the harness needs, found {FLAGS[name].value}"
            )
    settings = read_settings(simple_parse_args_string(FLAGS.model_args), HarnessSettings)
    gen_kwargs, samples = _read_gen_kwargs(simple_parse_args_string), _read_samples()
    tasks = _open_tasks(samples)  # before the model, whose loading takes longer
    model = HarnessModel(settings)
    cache = FLAGS.use_cache and os.path.join(FLAGS.use_cache, model.fingerprint())
    tracker = EvaluationTracker(output_path=FLAGS.output_path)
    results: Any = simple_evaluate(  # pyright: ignore[reportCallIssue]: a decorator hides its parameters
        model=model,
        model_args={"model": settings.checkpoint},
        tasks=FLAGS.tasks,
        num_fewshot=FLAGS.num_fewshot,
        use_cache=cache,
        limit=FLAGS.limit,
        samples=samples,
        log_samples=FLAGS.log_samples,
        evaluation_tracker=tracker,
        system_instruction=FLAGS.system_instruction,
        apply_chat_template=FLAGS.apply_chat_template,
        gen_kwargs=gen_kwargs,
        task_manager=tasks,
    )
    assert results is not None, "only another rank of a distributed run has none"
    results["config"]["model_args"] = FLAGS.model_args
    if FLAGS.output_path:
        _save(tracker, dict(results))
    return dict(results)


def read_settings(values: dict[str, Any], settings: type) -> Any:
    """The `HarnessSettings` of --model_args.

    Args:
      values: {name: value}.
      settings: the class `HarnessSettings`.

    Raises:
      InputError: lists unknown names, values of the wrong type, and a missing checkpoint.
    """
    plain = {field.name: field.type for field in dataclasses.fields(settings) if field.name not in ("mesh", "changes")}
    changes = {field.name: field.type for field in dataclasses.fields(ModelChanges)}
    known = plain | changes | dict.fromkeys(AXES, int)
    errors = ["checkpoint: expected a model folder, found none"] if "checkpoint" not in values else []
    for name, value in values.items():
        if name not in known:
            errors.append(f"{name}: expected one of {', '.join(known)}, found an unknown name")
        elif not _has_type(value, known[name]):
            errors.append(f"{name}: expected {_type_name(known[name])}, found {value!r}")
    for name, choices in (("gate", GATES), ("dtype", CHOICES["dtype"])):
        if values.get(name, choices[0]) not in choices:
            errors.append(f"{name}: expected one of {', '.join(choices)}, found {values[name]!r}")
    if errors:
        raise InputError("\n".join(f"--model_args: {error}" for error in errors))
    is_number = lambda name, value: value is not None and _type_name(known[name]) == "a number"
    values = {name: float(v) if is_number(name, v) else v for name, v in values.items()}
    pick: Any = lambda names: {name: values[name] for name in names if name in values}
    mesh = MeshConfig(**{"replica": 1, "fsdp": 1, "tensor": 1} | axes) if (axes := pick(AXES)) else None
    return settings(**pick(plain), mesh=mesh, changes=ModelChanges(**pick(changes)))


def _has_type(value: object, wanted: Any) -> bool:
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed) or (isinstance(value, int) and float in allowed)


def _type_name(wanted: Any) -> str:
    names = {float: "a number", int: "an integer", bool: "true or false", str: "text"}
    return next(name for kind, name in names.items() if _has_type(kind(), wanted))


def _read_json(flag: str) -> Any:
    text = FLAGS[flag].value
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--{flag}: expected JSON, found {text!r} ({error})") from error


def _read_gen_kwargs(parse: Any) -> dict[str, Any] | None:
    text = FLAGS.gen_kwargs
    return _read_json("gen_kwargs") if text and text.lstrip().startswith("{") else text and parse(text)


def _read_samples() -> dict[str, list[int]] | None:
    samples = _read_json("samples")
    good = isinstance(samples, dict) and all(
        isinstance(indices, list) and indices and all(isinstance(i, int) and i >= 0 for i in indices)
        for indices in samples.values()
    )
    if samples is not None and not good:
        raise InputError(f'--samples: expected {{"task": [0, 3], …}}, found {FLAGS.samples}')
    return samples


def _open_tasks(samples: dict[str, list[int]] | None) -> Any:
    """The harness's task manager, which applies --repeats to the tasks that it loads, and checks --samples."""
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def load(self, task_list: Any) -> Any:
            loaded = super().load(task_list)
            for name, task in loaded["tasks"].items():
                _set_repeats(name, task)
            for name, indices in (samples or {}).items():
                if name not in loaded["tasks"]:
                    raise InputError(f"--samples: expected {', '.join(loaded['tasks'])}, found {name}")
                if max(indices) >= (count := len(loaded["tasks"][name].eval_docs)):
                    raise InputError(f"--samples: expected indices below {count} for {name}, found {max(indices)}")
            return loaded

    tasks = Tasks(include_path=FLAGS.include_path)
    names = set(tasks.all_tasks)
    unknown = [name for name in FLAGS.tasks if name not in names and not os.path.isfile(name)]
    if unknown:
        raise InputError(
            f"--tasks: expected names of tasks or YAML files, found {', '.join(unknown)}; lm_eval ls tasks lists those"
            " of the harness, and --include_path adds a folder"
        )
    return tasks


def _set_repeats(name: str, task: Any) -> None:
    """Applies --repeats; refuses a task that would score only the first of its answers."""
    if FLAGS.repeats is not None:
        task.set_config(key="repeats", value=FLAGS.repeats)
    filters = task.get_config("filter_list") or [{"filter": [{"function": "take_first"}]}]
    first_only = all(_takes_first(entry["filter"]) for entry in filters)
    if task.get_config("repeats") > 1 and first_only:
        raise InputError(
            f"--repeats: expected a task that scores all {task.get_config('repeats')} answers to a prompt, found"
            f" {name}, which takes the first; launch/benchmarks has tasks that average them"
        )


def _takes_first(steps: list[dict[str, Any]]) -> bool:
    """Whether a task's filter drops all answers but the first before any step that can read them all."""
    reading = ("take_first", "take_first_k", "majority_vote", "custom")
    return next((step["function"] for step in steps if step["function"] in reading), "") == "take_first"


def _save(tracker: Any, results: dict[str, Any]) -> None:
    """Writes the harness's result files; it only logs an error, which this raises as an OSError."""
    samples, model = results.pop("samples", None), str(tracker.general_config_tracker.model_name_sanitized)
    folder = as_path(FLAGS.output_path) / model
    with folder_on_disk(as_path(FLAGS.output_path)) as output:
        tracker.output_path = str(output)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in (samples or {}).items():
            tracker.save_results_samples(task_name=task, samples=rows)
        written = [path.name for path in (output / model).glob(f"*{getattr(tracker, 'date_id', 'none')}*")]
    if len(written) != 1 + len(samples or {}):
        raise OSError(
            f"{folder}: expected {1 + len(samples or {})} files of results, found {', '.join(written) or 'none'}"
        )
    print(f"wrote {folder / written[0]}" if len(written) == 1 else f"wrote {len(written)} files in {folder}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
