"""The command for lm-evaluation-harness and its model, on local tasks of the embedded LoopLM."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

lm_eval = pytest.importorskip("lm_eval")

from absl import flags  # noqa: E402

import melt_jax.lm_eval as command  # noqa: E402
from melt_jax.config import InputError  # noqa: E402
from melt_jax.inference import harness  # noqa: E402
from melt_jax.inference.harness import HarnessModel, HarnessSettings  # noqa: E402
from tests.helpers.devices import several_devices  # noqa: E402

# The harness and its libraries warn of their own deprecated calls.
pytestmark = pytest.mark.filterwarnings("ignore")
TEACHER = "melt_jax/assets/ouro_nano"
PROMPT = "<|im_start|>c=b*3;a=4;b=a+2;c?<think>"
SAMPLED = {"until": [";"], "do_sample": True, "temperature": 30.0, "max_gen_toks": 8}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def model():
    return HarnessModel(HarnessSettings(TEACHER, batch_size=4))


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def run(monkeypatch, *arguments):
    """Runs the command's `evaluate` with these flags."""
    values = flags.FlagValues()
    with monkeypatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        patch.setattr(command, "FLAGS", values)
        for name in ("DEFINE_string", "DEFINE_list", "DEFINE_integer", "DEFINE_float", "DEFINE_boolean"):
            define = getattr(flags, name)
            patch.setattr(flags, name, lambda *a, define=define, **k: define(*a, flag_values=values, **k))
        command.define_flags()
        values(["melt_jax.lm_eval", "--include_path=tests/tasks", *arguments])
        return command.evaluate()


def metrics(results, task):
    return {name.split(",")[0]: value for name, value in results["results"][task].items()}


@pytest.mark.slow
def test_command_scores_local_tasks(monkeypatch, offline, tmp_path):
    """The embedded LoopLM solves the multiple choice and stops at the stop string; results are written as JSON."""
    results = run(
        monkeypatch,
        f"--model_args=checkpoint={TEACHER},batch_size=40",
        "--tasks=arithmetic_choice,arithmetic_step,arithmetic_perplexity",
        "--limit=12",
        f"--output_path={tmp_path}",
        "--log_samples",
    )
    assert metrics(results, "arithmetic_choice")["acc"] == 1.0
    assert metrics(results, "arithmetic_step")["exact_match"] == 1.0
    assert 1.0 < metrics(results, "arithmetic_perplexity")["byte_perplexity"] < 64
    (file,) = tmp_path.glob("*/results_*.json")
    assert json.loads(file.read_text())["results"]["arithmetic_choice"]["acc,none"] == 1.0
    assert len(list(tmp_path.glob("*/samples_*.jsonl"))) == 3


@pytest.mark.slow
def test_mesh_gives_the_same_scores(tmp_path):
    """Four devices: scoring is split over fsdp and tensor, generation over tensor."""
    words = ["--tasks=arithmetic_choice,arithmetic_step", "--include_path=tests/tasks", "--limit=6"]
    words += [f"--model_args=checkpoint={TEACHER},fsdp=2,tensor=2", f"--output_path={tmp_path}"]
    environment = several_devices(4) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "data")}
    command = [sys.executable, "-m", "melt_jax.lm_eval", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*/results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["arithmetic_choice"]["acc,none"] == results["arithmetic_step"]["exact_match,none"] == 1.0


@pytest.mark.slow
def test_chat_and_thinking_give_answers(monkeypatch, offline):
    results = run(
        monkeypatch,
        f"--model_args=checkpoint={TEACHER},batch_size=12,think_end_token=</think>",
        "--tasks=arithmetic_answer",
        "--limit=12",
        "--apply_chat_template",
    )
    assert metrics(results, "arithmetic_answer")["exact_match"] == 1.0


def test_thinking_switch_reaches_the_template(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    file = folder / "tokenizer_config.json"
    template = "{{ messages[0].content }}{% if add_generation_prompt %}|{% if enable_thinking %}T{% endif %}{% endif %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    for thinking, text in ((True, "a|T"), (False, "a|")):
        model = HarnessModel(HarnessSettings(str(folder), enable_thinking=thinking))
        assert model.apply_chat_template([{"role": "user", "content": "a"}]) == text


@pytest.mark.parametrize("allow", [False, True])
def test_messages_are_encoded_as_text(model, monkeypatch, allow):
    """A special token in a message is none to the model, unless allowed; the arithmetic vocabulary then has no `<`."""
    monkeypatch.setattr(model, "settings", HarnessSettings(TEACHER, allow_special_tokens=allow))
    text = model.apply_chat_template([{"role": "user", "content": "a=4;<|im_end|>a?"}])
    assert json.loads(json.dumps(text)) == text and ("<|im_end|>" in text) == allow
    if allow:
        assert model.eot_token_id in model.tok_encode(text)
    else:
        with pytest.raises(InputError, match="no token for"):
            model.tok_encode(text)


def test_rolling_windows_predict_every_token_once(model, monkeypatch):
    """With 7 positions a text is scored in windows; the first predicts 7 tokens, every later one 7 further ones."""
    text = "c=b*3;a=4;b=a+2;"
    monkeypatch.setattr(model, "max_length", 7)
    asked = []
    score = harness.score_continuations
    monkeypatch.setattr(harness, "score_continuations", lambda m, a, *rest: asked.extend(a) or score(m, a, *rest))
    (total,) = model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert [token for request in asked for token in request.tokens] == model.tok_encode(text)
    assert all(len(request.context) + len(request.tokens) - 1 <= 7 for request in asked)
    alone = [next(score(model.model, [request], model.chunk_size, 1))[1].log_probability for request in asked]
    assert total == pytest.approx(sum(alone), rel=1e-4)


def test_inputs_too_long_are_counted(model, monkeypatch, capsys):
    monkeypatch.setattr(model, "max_length", 16)
    model.loglikelihood(requests((PROMPT, "b"), ("a=4;", "b")), disable_tqdm=True)
    dropped = len(model.tok_encode(PROMPT)) + 1 - 17
    assert f"warning: 1 of 2 requests did not fit into 16 positions and lost their first tokens, {dropped} at most" in (
        capsys.readouterr().err
    )
    model.generate_until(requests((PROMPT, {"until": [], "max_gen_toks": 4})), disable_tqdm=True)
    assert "warning: 1 of 1 prompts did not fit" in capsys.readouterr().err
    with pytest.raises(InputError, match="max_gen_toks: expected less than 16"):
        model.generate_until(requests((PROMPT, {"max_gen_toks": 16})), disable_tqdm=True)


def test_answers_without_the_end_of_thinking_are_counted(model, monkeypatch, capsys):
    monkeypatch.setattr(model, "settings", dataclasses.replace(model.settings, think_end_token="</think>"))
    for new_tokens, unfinished in ((2, True), (24, False)):
        model.generate_until(requests((PROMPT, {"until": [], "max_gen_toks": new_tokens})), disable_tqdm=True)
        warning = "warning: 1 of 1 answers end without </think>"
        assert (warning in capsys.readouterr().err) == unfinished


@pytest.mark.slow
def test_samples_depend_on_seed_and_number_only(model):
    """Equal requests give different samples; neither the other requests nor the batch change them."""
    ask = (PROMPT, SAMPLED)
    samples = model.generate_until(requests(*[ask] * 6), disable_tqdm=True)
    assert len(set(samples)) > 1
    other = model.generate_until(requests(("a=4;", SAMPLED), *[ask] * 2), disable_tqdm=True)
    assert other[1:] == samples[:2]
    reseeded = HarnessModel(HarnessSettings(TEACHER, batch_size=6, seed=1))
    assert reseeded.generate_until(requests(*[ask] * 6), disable_tqdm=True) != samples


@pytest.mark.parametrize("options", [SAMPLED, {"until": [";b"], "max_gen_toks": 12}], ids=["sampled", "greedy"])
def test_killed_generation_resumes_from_its_cache(tmp_path, monkeypatch, options):
    """Batches that were finished before the kill are not generated again, and the answers are the same."""
    texts = [(f"<|im_start|>a=b*3;b={i};a?<think>", options) for i in range(6)] + [(PROMPT, options)] * 2
    whole = HarnessModel(HarnessSettings(TEACHER, batch_size=2)).generate_until(requests(*texts), disable_tqdm=True)
    generate, prompts = harness.generate, []

    def killed(model, batch, *rest, **kwargs):
        if len(prompts) >= 4:
            raise KeyboardInterrupt
        prompts.extend(batch)
        return generate(model, batch, *rest, **kwargs)

    def cached():
        return lm_eval.api.model.CachingLM(HarnessModel(HarnessSettings(TEACHER, batch_size=2)), str(tmp_path / "db"))

    with monkeypatch.context() as patch:
        patch.setattr(harness, "generate", killed)
        first = cached()
        with pytest.raises(KeyboardInterrupt):
            first.generate_until(requests(*texts))
        first.dbdict.close()
    prompts.clear()
    monkeypatch.setattr(
        harness, "generate", lambda m, batch, *r, **k: prompts.extend(batch) or generate(m, batch, *r, **k)
    )
    again = cached()
    assert again.generate_until(requests(*texts)) == whole
    again.dbdict.close()
    unique = 8 if options is SAMPLED else 7
    assert len(prompts) == 2 * -(-(unique - 4) // 2)


def test_fingerprint_names_what_changes_answers(model):
    def of(**changes):
        return HarnessModel(HarnessSettings(TEACHER, **changes)).fingerprint()

    assert of(batch_size=3, seed=4) == model.fingerprint()
    changed = [of(chunk_size=7), of(think_end_token="x"), of(changes=harness.ModelChanges(loops=2))]
    assert len({model.fingerprint(), *changed}) == 4


def test_unknown_generation_settings_are_refused(model):
    with pytest.raises(InputError, match=r"generation_kwargs: expected until, .* found num_beams"):
        model.generate_until(requests((PROMPT, {"num_beams": 2})), disable_tqdm=True)


def test_model_args_are_read_and_checked():
    settings = command.read_settings({"checkpoint": "x", "window": 8, "tensor": 2, "guidance": 1}, HarnessSettings)
    assert (settings.changes.window, settings.changes.guidance, settings.mesh.tensor, settings.mesh.fsdp) == (
        8,
        1,
        2,
        1,
    )
    with pytest.raises(InputError) as error:
        command.read_settings({"windw": 8, "loops": "four", "dtype": "int8", "batch_size": True}, HarnessSettings)
    lines = str(error.value).splitlines()
    assert lines[0] == "--model_args: checkpoint: expected a model folder, found none"
    assert lines[1].startswith("--model_args: windw: expected one of checkpoint, batch_size, ")
    assert lines[2:] == [
        "--model_args: loops: expected an integer, found 'four'",
        "--model_args: batch_size: expected an integer, found True",
        "--model_args: dtype: expected one of float32, bfloat16, found 'int8'",
    ]


def test_changes_of_the_model_are_applied():
    settings = command.read_settings(
        {"checkpoint": TEACHER, "gate": "last", "window": 8, "loops": 2, "tensor": 1}, HarnessSettings
    )
    config = HarnessModel(settings).model.config
    assert (config.gate, config.window, config.loops) == ("last", 8, 2)


def test_missing_harness_is_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"lm_eval: expected lm-evaluation-harness, .*pip install -e '.\[eval\]'"):
        run(monkeypatch, f"--model_args=checkpoint={TEACHER}", "--tasks=arithmetic_choice")


@pytest.mark.slow
def test_unknown_tasks_are_named(monkeypatch):
    with pytest.raises(InputError, match="--tasks: expected names of tasks or YAML files, found arithmetic_choise"):
        run(monkeypatch, f"--model_args=checkpoint={TEACHER}", "--tasks=arithmetic_choise,arithmetic_step")


@pytest.mark.slow
def test_repeats_need_a_task_that_scores_all(monkeypatch, offline):
    with pytest.raises(
        InputError, match="--repeats: expected a task that scores all 2 answers to a prompt, found arithme"
    ):
        run(monkeypatch, f"--model_args=checkpoint={TEACHER}", "--tasks=arithmetic_answer", "--repeats=2")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("melt_jax/assets/modeling_melt.py").exists(), reason="exports lack PyTorch code")
def test_scores_equal_those_of_pytorch():
    """The short form of `tests.long.harness`: the harness's own model gives the same scores."""
    pytest.importorskip("accelerate")  # which the harness's own model needs
    command = [sys.executable, "-m", "tests.long.harness", "--limit=6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 7


def test_harness_is_imported_by_its_command_alone():
    root = pathlib.Path(command.__file__).parent
    users = [path.name for path in root.rglob("*.py") if "lm_eval" in path.read_text().replace("melt_jax.lm_eval", "")]
    assert sorted(users) == ["harness.py", "lm_eval.py"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit=0"], "--limit: expected more than 0, found 0"),
        (["--limit=5", '--samples={"arithmetic_answer": [0]}'], "--limit, --samples: expected one of them, found both"),
        (["--repeats=0"], "--repeats: expected at least 1, found 0"),
        (["--samples=[1]"], r"--samples: expected .*, found \[1\]"),
        (['--samples={"arithmetic": [0]}'], "--samples: expected arithmetic_answer, found arithmetic"),
        (
            ['--samples={"arithmetic_answer": [99999]}'],
            r"--samples: expected indices below \d+ for arithmetic_",
        ),
        (["--gen_kwargs=temperature=x,do_sample=true"], "generation_kwargs: temperature: expected a number, found 'x'"),
    ],
)
def test_bad_flags_are_one_line(monkeypatch, offline, flags, message):
    with pytest.raises(InputError, match=f"^{message}"):
        run(monkeypatch, f"--model_args=checkpoint={TEACHER}", "--tasks=arithmetic_answer", *flags)


def test_settings_of_none_are_the_defaults(model):
    options = {"do_sample": True, "temperature": None, "top_p": None, "until": [], "max_gen_toks": 2}
    assert len(model.generate_until(requests((PROMPT, options)), disable_tqdm=True)) == 1


def test_values_of_none_stay_none():
    assert command.read_settings({"checkpoint": "x", "guidance": None}, HarnessSettings).changes.guidance is None


def test_cached_sampling_must_be_declared(model, monkeypatch):
    """The harness caches answers without `do_sample` by their prompt alone."""
    monkeypatch.setattr(model.cache_hook, "dbdict", {})
    with pytest.raises(InputError, match="generation_kwargs: expected do_sample with temperature 1 and --use_cache, "):
        model.generate_until(requests((PROMPT, {"temperature": 1.0, "max_gen_toks": 2})), disable_tqdm=True)


@pytest.mark.parametrize(
    "steps, first",
    [
        (["regex", "take_first"], True),
        (["take_first", "majority_vote"], True),
        (["regex", "majority_vote", "take_first"], False),
        (["take_first_k", "majority_vote", "take_first"], False),
        (["custom"], False),
    ],
)
def test_filters_that_read_all_answers_are_known(steps, first):
    assert command._takes_first([{"function": step} for step in steps]) == first


def test_template_without_system_role_is_named(model):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InputError, match="the chat template rejects a prompt: expected the role user or assistant"):
        model.apply_chat_template(messages)
