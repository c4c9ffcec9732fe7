"""Generates text from a checkpoint folder, published or of this package, as it comes.

    python -m melt_jax.generate --checkpoint=melt_jax/assets/ouro_nano --prompt="c=b*3;a=4;b=a+2;c?"
    python -m melt_jax.generate --checkpoint=DIR --prompts_file=F --nochat --temperature=1 --top_p=0.7 --seed=3

One prompt streams; several are run together, each giving what it gives alone, and printed one after the other. The last
lines count: tokens, tokens per second without compilation, the cache's bytes.
"""

import pathlib
import sys

import jax.numpy as jnp
from absl import app, flags, logging

from melt_jax.checkpoints.orbax import default_chunk, open_model
from melt_jax.config import GATES
from melt_jax.data.text import Tokenizer
from melt_jax.inference.generation import Sampling, generate
from melt_jax.model.cache import bytes_per_token

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Checkpoint folder, published or of this package.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A file with one prompt a line, added to those of --prompt.")
CHAT = flags.DEFINE_boolean("chat", True, "Put prompts into the checkpoint's chat template; --nochat: as they are.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "The most new tokens of each prompt; by default 512, or what the model's positions leave."
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Divides the logits; 0 is greedy.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens that together reach this probability; 1: all.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Only so many of the likeliest tokens; 0: all.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Of sampling; the token drawn depends on it, the prompt's and the token's number."
)
LOOPS = flags.DEFINE_integer("loops", None, "T, where it is not the checkpoint's.")
EXIT_THRESHOLD = flags.DEFINE_float(
    "exit_threshold", None, "Cumulative exit probability at which a loop's logits are taken; 1: the last loop's."
)
PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", None, "Tokens of a chunk of the prefill; by default those a MELT was trained with, or 512."
)
GATE = flags.DEFINE_enum("gate", None, GATES, "A gate in place of the checkpoint's; none: the LoopLM inside a MELT.")
DTYPE = flags.DEFINE_enum("dtype", None, ("float32", "bfloat16"), "Of the weights and rows; by default as stored.")


def main(argv):
    """Prompts in, text out, and counts."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    texts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        texts += [line for line in pathlib.Path(PROMPTS_FILE.value).read_text().splitlines() if line.strip()]
    if not texts:
        raise app.UsageError("there is no prompt: give --prompt or --prompts_file")
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value)
    try:
        model = open_model(CHECKPOINT.value, dtype=DTYPE.value, gate=GATE.value)
        tokenizer = Tokenizer(CHECKPOINT.value)
        chunk = default_chunk(CHECKPOINT.value, model.config) if PREFILL_CHUNK.value is None else PREFILL_CHUNK.value
        prompts = [encode_prompt(tokenizer, text, CHAT.value) for text in texts]
        streamer = tokenizer.stream() if len(texts) == 1 else None
        result = generate(
            model,
            prompts,
            most_new_tokens(model.config, prompts) if MAX_NEW_TOKENS.value is None else MAX_NEW_TOKENS.value,
            chunk,
            sampling,
            stop=tokenizer.stop_ids,
            loops=LOOPS.value,
            exit_threshold=EXIT_THRESHOLD.value,
            block=1 if streamer else 32,
            on_tokens=printer(streamer, tokenizer.stop_ids) if streamer else None,
        )
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    if streamer:
        print(streamer.finish())
    else:
        for text, tokens in zip(texts, result.tokens):
            print(f"{text}\n{tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])}\n")
    print(counts(result, model))


def encode_prompt(tokenizer, text, chat):
    """Token ids of a prompt, in the chat template or as it is."""
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)


def most_new_tokens(config, prompts):
    """512, or as many as the model's positions leave beside the longest prompt; at least one."""
    return max(1, min(512, config.max_positions - max(map(len, prompts))))


def printer(streamer, stop):
    """A function that prints the one prompt's tokens as text when they come, but no stop token."""

    def show(new):
        for token in new[0]:
            if token not in stop:
                sys.stdout.write(streamer.push(token))
        sys.stdout.flush()

    return show


def counts(result, model):
    """What says how many tokens there were, how fast, in which cache."""
    left = [loop for row in result.exit_loops for loop in row]
    per_token = bytes_per_token(model.config, jnp.dtype(model.dtype).itemsize, result.loops)
    return (
        f"{result.prompt_tokens} prompt tokens at {result.prefill_speed:,.0f}/s, "
        f"{result.new_tokens} new tokens at {result.decode_speed:,.1f}/s; "
        f"{result.compile_seconds:.1f} s of compilation not counted\n"
        f"cache {result.cache_bytes:,} bytes, {per_token:,} bytes a token; {result.loops} loops, "
        f"left after {sum(left) / len(left):.2f}"
    )


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    flags.mark_flag_as_required("checkpoint")
    app.run(main)
