"""Generates text from a model folder, in published or Orbax form.

    python -m melt_jax.generate --checkpoint=melt_jax/assets/ouro_nano --prompt="c=b*3;a=4;b=a+2;c?"
    python -m melt_jax.generate --checkpoint=DIR --prompts_file=F --nochat --temperature=1 --top_p=0.7 --seed=3

The text of a single prompt is streamed. Several prompts run as one batch, and none affects the others. The last lines
report tokens, tokens per second without compilation, and the size of the KV cache.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from melt_jax import command_line
from melt_jax.checkpoints import hub
from melt_jax.checkpoints.orbax import default_chunk
from melt_jax.config import InputError, ModelConfig
from melt_jax.data.text import Tokenizer
from melt_jax.files import as_path
from melt_jax.inference.generation import GREEDY, Generation, GenerationOptions, Sampling, for_decoding, generate
from melt_jax.inference.loading import UNCHANGED, ModelChanges, define_model_flags, open_for_inference, read_model_flags
from melt_jax.model.cache import bytes_per_sequence, bytes_per_token
from melt_jax.model.model import LoopedTransformer

FLAGS = flags.FLAGS
NEW_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a generation. None: the checkpoint's value, or the default stated here.

    Attributes:
      checkpoint: folder of the model and its tokenizer.
      prompts: one text each.
      chat: put prompts into the checkpoint's chat template.
      thinking: render the template with `enable_thinking`; without `chat` it has no effect.
      allow_special_tokens: with `chat`, special tokens in prompts become their ids; otherwise they are ordinary text.
        Without `chat` they always become their ids.
      max_new_tokens: per prompt; None: 512, or as many as the model has positions for.
      sampling: how tokens are selected.
      prefill_chunk: C of the prefill; None: the chunk that a MELT was trained with, or 512.
      changes: values that replace the checkpoint's.
    """

    checkpoint: str
    prompts: Sequence[str]
    chat: bool = True
    thinking: bool = True
    allow_special_tokens: bool = False
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    prefill_chunk: int | None = None
    changes: ModelChanges = UNCHANGED


@dataclasses.dataclass(frozen=True)
class Texts:
    """The completions of prompts, without stop tokens; their `Generation`; and its summary in two lines."""

    completions: list[str]
    generation: Generation
    summary: str


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("checkpoint", None, "Model folder in either form, or a model of the hub.", required=True)
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "A file with one prompt per line, added to those of --prompt.")
    flags.DEFINE_boolean("chat", True, "Put prompts into the checkpoint's chat template; --nochat: as they are.")
    flags.DEFINE_boolean(
        "thinking",
        True,
        "Render the template with enable_thinking, so that a Thinking model's prompt ends in <think>.",
    )
    flags.DEFINE_boolean(
        "allow_special_tokens",
        False,
        "Special tokens in prompts of the chat template become their ids; by default they are ordinary text.",
    )
    flags.DEFINE_integer(
        "max_new_tokens", None, f"Maximum new tokens per prompt. Default: {NEW_TOKENS}, within the model's positions."
    )
    flags.DEFINE_float("temperature", 0.0, "Divides the logits; 0 is greedy.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the most likely tokens that together reach this probability; 1: all.")
    flags.DEFINE_integer("top_k", 0, "Sample from this many of the most likely tokens; 0: all.")
    flags.DEFINE_integer(
        "seed", 0, "Seed of sampling; a token's random key depends only on it and the indices of prompt and token."
    )
    flags.DEFINE_integer("prefill_chunk", None, "Tokens per prefill chunk. Default: a MELT's training chunk, or 512.")
    flags.DEFINE_integer("loops", None, "Number of loops, T. Default: the checkpoint's.")
    define_model_flags()


def main(argv: list[str]) -> None:
    """Reads the flags, generates and prints."""
    del argv
    prompts = list(FLAGS.prompt)
    if FLAGS.prompts_file:
        prompts += read_prompts(FLAGS.prompts_file)
    if not prompts:
        raise InputError("--prompt, --prompts_file: expected at least one prompt, found none")
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed)
    names = {field.name for field in dataclasses.fields(Settings)} - {"prompts", "sampling", "changes"}
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    settings = Settings(prompts=prompts, sampling=sampling, changes=read_model_flags(FLAGS.loops), **values)
    streams = len(prompts) == 1
    texts = generate_text(settings, _write if streams else None)
    if streams:
        print()
    else:
        for prompt, completion in zip(prompts, texts.completions):
            print(f"{prompt}\n{completion}\n")
    print(texts.summary)


def read_prompts(path: str) -> list[str]:
    """The lines of a file of prompts that are not blank.

    Raises:
      InputError: the file is not text in UTF-8.
    """
    try:
        lines = as_path(path).read_bytes().decode("utf-8-sig").split("\n")
        return [line.removesuffix("\r") for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts_file: expected text in UTF-8 in {path}, found {error}") from error


def generate_text(settings: Settings, on_text: Callable[[str], None] | None = None) -> Texts:
    """Completes prompts.

    Args:
      settings: see `Settings`.
      on_text: called with each piece of the text of a single prompt as soon as it is generated.

    Raises:
      InputError: values out of range, prompts that cannot be run, or a checkpoint that cannot be opened.
      FileNotFoundError: the checkpoint has no tokenizer.
    """
    if on_text and len(settings.prompts) != 1:
        raise InputError(f"prompts: expected one, whose text is streamed, found {len(settings.prompts)}")
    folder = hub.local_folder(settings.checkpoint)
    model, tokenizer = for_decoding(open_for_inference(folder, settings.changes)), Tokenizer(folder)
    prompts = [encode_prompt(tokenizer, text, settings) for text in settings.prompts]
    new_tokens, chunk = settings.max_new_tokens, settings.prefill_chunk
    options = GenerationOptions(
        most_new_tokens(model.config, prompts) if new_tokens is None else new_tokens,
        default_chunk(folder, model.config) if chunk is None else chunk,
        settings.sampling,
        tuple(tokenizer.stop_ids),
        block=1 if on_text else 32,
    )
    streamer, show = tokenizer.stream(), on_text or (lambda text: None)

    def push(new: list[list[int]]) -> None:
        show("".join(streamer.push(token) for token in new[0] if token not in options.stop))

    generation = generate(model, prompts, options, on_tokens=push if on_text else None)
    show(streamer.finish())
    written = ([token for token in tokens if token not in options.stop] for tokens in generation.tokens)
    return Texts([tokenizer.decode(tokens) for tokens in written], generation, summarize(generation, model))


def encode_prompt(tokenizer: Tokenizer, text: str, settings: Settings) -> list[int]:
    """Token ids of a prompt, in the chat template or as it is."""
    if not settings.chat:
        return tokenizer.encode(text)
    return tokenizer.chat([{"role": "user", "content": text}], settings.thinking, settings.allow_special_tokens)


def most_new_tokens(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> int:
    """512, or as many as the model has positions for after the longest prompt; at least one."""
    return max(1, min(NEW_TOKENS, config.max_positions - max(map(len, prompts))))


def summarize(generation: Generation, model: LoopedTransformer) -> str:
    """Tokens, tokens per second, size of the KV cache and mean exit loop, in two lines."""
    exits = [loop for loops in generation.exit_loops for loop in loops]
    itemsize = model.dtype.itemsize
    return (
        f"{generation.prompt_tokens} prompt tokens at {generation.prefill_speed:,.0f}/s, "
        f"{generation.new_tokens} new tokens at {generation.decode_speed:,.1f}/s; "
        f"{generation.compile_seconds:.1f} s of compilation excluded\n"
        f"KV cache {generation.cache_bytes:,} bytes: {bytes_per_token(model.config, itemsize):,} per token, "
        f"{bytes_per_sequence(model.config, itemsize):,} per sequence; {generation.loops} loops, "
        f"mean exit loop {sum(exits) / len(exits):.2f}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
