"""A model folder as a model of lm-evaluation-harness (the package `lm_eval`, which must be installed).

Prompts are generated and continuations scored by this package's own inference. Like the harness's own `hf` model it
cuts inputs that are longer than the model's positions on the left, and it prints a line that counts them.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from melt_jax.checkpoints import hub
from melt_jax.checkpoints.orbax import default_chunk, weights_digest
from melt_jax.config import InputError, MeshConfig
from melt_jax.data.text import Tokenizer
from melt_jax.inference.generation import GenerationOptions, for_decoding, generate
from melt_jax.inference.likelihood import Continuation, score_continuations
from melt_jax.inference.loading import UNCHANGED, ModelChanges, open_for_inference
from melt_jax.inference.sampling import Sampling
from melt_jax.inference.stop_strings import StopFinder
from melt_jax.sharding import make_mesh

SLOT_MULTIPLE = 128
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's names of one number
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")  # of a task's generation_kwargs


@dataclasses.dataclass(frozen=True)
class HarnessSettings:
    """How the harness runs a checkpoint.

    Attributes:
      checkpoint: model folder with its tokenizer, or a model of the hub.
      batch_size: requests that run at a time.
      chunk_size: C of prefill and scoring; None: the chunk that a MELT was trained with, or 512.
      max_length: positions of a request, prompt and new tokens together; None: the model's.
      max_gen_toks: new tokens of a request whose task does not state a number.
      seed: of sampling. A sample depends on it, the prompt and the sample's number only.
      enable_thinking: passed to the chat template.
      allow_special_tokens: special tokens in the messages of a chat become their ids; otherwise they are ordinary text.
      think_end_token: text that ends the thinking, such as `</think>`. What precedes it is removed from answers, and
        stop strings count only after it; empty: answers are whole, and stop strings count everywhere.
      mesh: None: one device.
      changes: values that replace the checkpoint's.
    """

    checkpoint: str
    batch_size: int = 16
    chunk_size: int | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    seed: int = 0
    enable_thinking: bool = True
    allow_special_tokens: bool = False
    think_end_token: str = ""
    mesh: MeshConfig | None = None
    changes: ModelChanges = UNCHANGED

    def errors(self) -> list[str]:
        """An error for each value out of range."""
        errors = Sampling(seed=self.seed).errors()
        for name in ("batch_size", "chunk_size", "max_length", "max_gen_toks"):
            if (value := getattr(self, name)) is not None and value < 1:
                errors.append(f"{name}: expected at least 1, found {value}")
        return errors


class HarnessModel(TemplateLM):
    """A checkpoint that the harness evaluates.

    Args:
      settings: see `HarnessSettings`.

    Raises:
      InputError: a setting is out of range, or the checkpoint cannot be opened.
      FileNotFoundError: the checkpoint has no tokenizer.
    """

    def __init__(self, settings: HarnessSettings) -> None:
        super().__init__()
        if errors := settings.errors():
            raise InputError("\n".join(errors))
        self.settings, self._folder = settings, hub.local_folder(settings.checkpoint)
        self.text = Tokenizer(self._folder)
        self._mesh = make_mesh(settings.mesh) if settings.mesh else None
        self.model = open_for_inference(self._folder, settings.changes, self._mesh)
        with self._in_mesh():
            self._decoder = for_decoding(self.model)
        positions = self.model.config.max_positions
        self.max_length = settings.max_length or positions
        if self.max_length > positions:
            raise InputError(f"max_length: expected at most {positions}, the model's, found {self.max_length}")
        self.chunk_size = settings.chunk_size or default_chunk(self._folder, self.model.config)
        self._cut: list[int] = []  # for each request that was too long, the number of its tokens that were dropped
        self._unfinished: set[tuple[str, int]] = set()  # the samples whose thinking did not end

    # ---- what the harness asks of every model

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        if self.text.eos is None:
            raise InputError(f"{self.text.folder}: expected an eos_token in tokenizer_config.json, found none")
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes a text without context: bos, else eos."""
        return self.eot_token_id if self.text.bos is None else self.text.bos

    @property
    def tokenizer_name(self) -> str:
        """Identifies tokenizer and chat template in the harness's cache of requests."""
        settings = f"{self.settings.enable_thinking}_{self.settings.allow_special_tokens}"
        return f"{self.text.sha256[:16]}_{str(self.text.template_sha256)[:16]}_{settings}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text. Special tokens in the text become their ids, unless protected; none are added."""
        return self.text.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's chat template; the harness writes it into its results."""
        return self.text.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt its last message is left open."""
        if self.text.template is None:
            raise InputError(
                f"{self.text.folder}: expected a chat template, found none; leave out --apply_chat_template"
            )
        thinking = self.settings.enable_thinking
        if not self.settings.allow_special_tokens:
            chat_history = self.text.protect(chat_history)
        try:
            return self.text.render(chat_history, add_generation_prompt, thinking, unfinished=not add_generation_prompt)
        except Exception as error:  # a template may raise anything
            raise InputError(
                f"{self.text.folder}: the chat template rejects a prompt: {error}; a template without a system"
                " role needs a task without description, and no --system_instruction"
            ) from error

    def get_model_info(self) -> dict[str, Any]:
        """Settings and the model's config, for the harness's results."""
        config = dataclasses.asdict(self.model.config) | {"dtype": self.model.dtype.name}
        return {"melt_jax": dataclasses.asdict(self.settings), "melt_jax_model": config, "chunk_size": self.chunk_size}

    def fingerprint(self) -> str:
        """A digest of everything that the answers depend on, the weights included, except the requests and the seed."""
        values = dataclasses.asdict(self.settings) | {"chunk_size": self.chunk_size, "max_length": self.max_length}
        for name in ("checkpoint", "batch_size", "mesh", "seed"):
            del values[name]
        parts = weights_digest(self._folder), self.tokenizer_name, json.dumps(values, sort_keys=True)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    # ---- likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        asked = [self._fit(context, tokens) for _, context, tokens in requests]
        for index, answer in self._score(asked, "loglikelihood", disable_tqdm):
            answers[index] = tuple(answer)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        self._report_cut("requests", len(requests))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text; a text longer than the model is scored in consecutive windows."""
        windows, owners = [], []
        for owner, (string,) in enumerate(request.args for request in requests):
            pieces = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length, 1)
            windows += [Continuation(*make_disjoint_window(piece)) for piece in pieces]
            owners += [owner] * (len(windows) - len(owners))
        left, totals = collections.Counter(owners), [0.0] * len(requests)
        for index, answer in self._score(windows, "loglikelihood_rolling", disable_tqdm):
            owner = owners[index]
            totals[owner] += answer.log_probability
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, totals[owner])
        return totals

    def _score(self, asked: Sequence[Continuation], kind: str, quiet: bool) -> Iterator[tuple[int, Any]]:
        with self._in_mesh():
            scores = score_continuations(self.model, asked, self.chunk_size, self.settings.batch_size)
            yield from tqdm(scores, desc=kind, total=len(asked), disable=quiet)

    def _fit(self, context: list[int], tokens: list[int]) -> Continuation:
        """The request without the first tokens of its context if it is too long; its last token is no input."""
        if not 1 <= len(tokens) <= self.max_length:
            raise InputError(f"continuation: expected 1 to {self.max_length} tokens, found {len(tokens)}")
        room = self.max_length + 1 - len(tokens)
        return Continuation(self._keep_last(context, room), tokens)

    # ---- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, cut at its stop strings, without special tokens and thinking.

        Equal requests are different samples, or if they are greedy the same answer. Samples go into the harness's cache
        under their number and the seed.
        """
        numbers, keys = collections.Counter(), []
        groups: dict[str, dict[tuple[str, int], None]] = {}
        for context, options in (request.args for request in requests):
            group = json.dumps(options)  # in the order of the harness's own cache keys
            number = numbers[group, context] if _sampling(options, self.settings).temperature else 0
            numbers[group, context] += 1
            groups.setdefault(group, {})[context, number] = None
            keys.append((group, context, number))
        answers = {}
        with tqdm(total=sum(map(len, groups.values())), desc="generate_until", disable=disable_tqdm) as bar:
            for group, prompts in groups.items():
                for (context, number), text in self._answer(json.loads(group), list(prompts)):
                    answers[group, context, number] = text
                    bar.update()
        self._report_cut("prompts", len(answers))
        self._report_unfinished(len(answers))
        return [answers[key] for key in keys]

    def _answer(
        self, options: dict[str, Any], prompts: Sequence[tuple[str, int]]
    ) -> Iterator[tuple[tuple[str, int], str]]:
        """Yields ((context, number of the sample), answer), the longest prompts first."""
        sampling, stops, new_tokens = _sampling(options, self.settings), *_limits(options, self.settings)
        sampled = bool(options.get("do_sample"))
        if sampling.temperature and not sampled and self.cache_hook.dbdict is not None:
            raise InputError(
                f"generation_kwargs: expected do_sample with temperature {sampling.temperature:g} and --use_cache,"
                " because the harness would store one sample for all, found none; add --gen_kwargs=do_sample=true"
            )
        if new_tokens >= self.max_length:
            raise InputError(
                f"max_gen_toks: expected less than {self.max_length}, the positions, found {new_tokens}; set"
                " --gen_kwargs=max_gen_toks=… or max_length in --model_args"
            )
        waiting = []
        for context, number in prompts:
            if (text := self._cached(context, options, number)) is not None:
                yield (context, number), text
            else:
                ids = self._keep_last(self.tok_encode(context), self.max_length - new_tokens)
                waiting.append((ids, context, number))
        waiting.sort(key=lambda item: len(item[0]), reverse=True)
        rows = min(self.settings.batch_size, len(waiting))
        make_options = GenerationOptions(
            new_tokens, self.chunk_size, sampling, tuple(self.text.stop_ids), slot_multiple=SLOT_MULTIPLE
        )
        for first in range(0, len(waiting), max(rows, 1)):
            batch = waiting[first : first + rows]
            # The last batch repeats its last prompt, so that all batches have one shape.
            padded = batch + [batch[-1]] * (rows - len(batch))
            texts = self._generate(padded, make_options, stops)
            for (_, context, number), text in zip(batch, texts):
                if sampled:
                    self.cache_hook.add_partial("generate_until", self._sample_key(context, options, number), text)
                else:
                    self.cache_hook.add_partial("generate_until", (context, options), text)
                yield (context, number), text

    def _generate(
        self, batch: Sequence[tuple[list[int], str, int]], options: GenerationOptions, stops: list[str]
    ) -> list[str]:
        """The answers to a batch of (token ids, context, number of the sample)."""
        end = self.settings.think_end_token
        finders = [StopFinder(self.text, stops, end) for _ in batch]

        def all_done(new: list[list[int]]) -> bool:
            return all([finder.push(tokens) for finder, tokens in zip(finders, new)])

        indices = [_random_index(context, number) for _, context, number in batch]
        with self._in_mesh():
            generate(self._decoder, [ids for ids, _, _ in batch], options, indices, on_tokens=all_done)
        texts = [finder.finish() for finder in finders]
        if self.settings.enable_thinking:
            self._unfinished |= {
                (context, number) for (_, context, number), text in zip(batch, texts) if end not in text
            }
        return [self._without_special(postprocess_generated_text(text, stops, end or None)) for text in texts]

    def _without_special(self, text: str) -> str:
        for special in self.text.special_tokens:
            text = text.replace(special, "")
        return text

    def _cached(self, context: str, options: dict[str, Any], number: int) -> str | None:
        """The cached answer to a sampled prompt. The harness looks up greedy ones itself, and never sampled ones."""
        database = self.cache_hook.dbdict
        if database is None:
            return None
        return database.get(hash_args("generate_until", self._sample_key(context, options, number)))

    def _sample_key(self, context: str, options: dict[str, Any], number: int) -> tuple[Any, ...]:
        return context, options, self.settings.seed, number

    # ---- shared

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _keep_last(self, tokens: list[int], room: int) -> list[int]:
        if len(tokens) > room:
            self._cut.append(len(tokens) - room)
        return tokens[max(len(tokens) - room, 0) :]

    def _report_cut(self, kind: str, total: int) -> None:
        if self._cut:
            print(
                f"warning: {len(self._cut)} of {total} {kind} did not fit into {self.max_length} positions and lost"
                f" their first tokens, {max(self._cut)} at most",
                file=sys.stderr,
            )
        self._cut = []

    def _report_unfinished(self, total: int) -> None:
        if self._unfinished:
            print(
                f"warning: {len(self._unfinished)} of {total} answers end without {self.settings.think_end_token}, so"
                " they are scored with their thinking; a larger max_gen_toks leaves more room for it",
                file=sys.stderr,
            )
        self._unfinished = set()


def _normalized(options: dict[str, Any], settings: HarnessSettings) -> dict[str, Any]:
    """A task's generation_kwargs with the harness's defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("temperature", "top_p", "top_k", *LIMITS):
        if not isinstance(given.get(name, 0), int | float):
            raise InputError(f"generation_kwargs: {name}: expected a number, found {given[name]!r}")
    return dict(normalize_gen_kwargs(given, settings.max_gen_toks))


def _sampling(options: dict[str, Any], settings: HarnessSettings) -> Sampling:
    """How a task's generation_kwargs select tokens.

    Raises:
      InputError: they hold a key that this model does not know, or a value out of range.
    """
    values = _normalized(options, settings)
    if unknown := sorted(set(values) - set(KNOWN)):
        raise InputError(
            f"generation_kwargs: expected {', '.join(KNOWN)}, found {', '.join(unknown)}; remove them from the task or"
            " from --gen_kwargs"
        )
    if not values["do_sample"]:
        return Sampling(seed=settings.seed)
    top_k, top_p = int(values.get("top_k") or 0), float(values.get("top_p", 1.0))
    sampling = Sampling(float(values.get("temperature", 1.0)), top_k, top_p, settings.seed)
    if errors := sampling.errors():
        raise InputError("; ".join(f"generation_kwargs: {error}" for error in errors))
    return sampling


def _limits(options: dict[str, Any], settings: HarnessSettings) -> tuple[list[str], int]:
    """The stop strings and the largest number of new tokens in a task's generation_kwargs."""
    values = _normalized(options, settings)
    return [stop for stop in values["until"] if stop], values["max_gen_toks"]


def _random_index(context: str, number: int) -> int:
    """The index of a sample's random key: the same whatever other requests there are."""
    return int.from_bytes(hashlib.sha256(f"{number} {context}".encode()).digest()[:4]) & 0x7FFFFFFF
