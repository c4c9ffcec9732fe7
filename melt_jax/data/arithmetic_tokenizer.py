"""The tokenizer of the arithmetic task in published form: one token per character, ids of `arithmetic.VOCABULARY`.

    python -m melt_jax.data.arithmetic_tokenizer --output=melt_jax/assets/ouro_nano

writes the tokenizer files of the embedded checkpoint.
"""

import argparse
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from melt_jax.data import arithmetic
from melt_jax.files import PathLike, as_path, make_folder, write_text

END, BEGIN, STOP, THINK, ANSWER = arithmetic.SPECIAL_TOKENS

# The generation prompt ends with <think>; an assistant's message holds the steps and the answer.
CHAT_TEMPLATE = f"""\
{{%- for message in messages -%}}
{{%- if message.role == 'user' -%}}
{{{{- '{BEGIN}' + message.content -}}}}
{{%- if add_generation_prompt or not loop.last -%}}{{{{- '{THINK}' -}}}}{{%- endif -%}}
{{%- elif message.role == 'assistant' -%}}
{{{{- message.content + '{STOP}' -}}}}
{{%- else -%}}
{{{{- raise_exception('expected the role user or assistant, found ' + message.role) -}}}}
{{%- endif -%}}
{{%- endfor -%}}"""


def tokenizer_files() -> dict[str, str]:
    """{file name: text} of tokenizer.json, tokenizer_config.json and generation_config.json."""
    # Without an unknown token, a character outside the vocabulary is an error instead of being dropped silently.
    tokenizer = Tokenizer(models.WordLevel(arithmetic.VOCABULARY))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in arithmetic.SPECIAL_TOKENS]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": STOP,
        "pad_token": END,
        "additional_special_tokens": [THINK, ANSWER],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": arithmetic.BEGIN, "eos_token_id": arithmetic.STOP, "pad_token_id": arithmetic.END}
    return {
        "tokenizer.json": json.dumps(json.loads(tokenizer.to_str()), indent=1) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }


def tokenizer_errors(folder: PathLike) -> list[str]:
    """The error of a model folder's tokenizer for the arithmetic task: at most one message.

    Empty if it gives every token of `arithmetic.VOCABULARY` its id, or if the folder has no tokenizer.json.
    """
    file = as_path(folder) / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        tokenizer = Tokenizer.from_str(file.read_text())
    except Exception as error:  # the library raises no narrower class
        return [f"{file}: expected a tokenizer, found {error}"]
    for token, expected in arithmetic.VOCABULARY.items():
        found = _encode(tokenizer, token)
        if found != [expected]:
            return [
                f"{folder}: expected the tokenizer of the arithmetic task, which encodes {token!r} as [{expected}],"
                f" found {found}; use a model of this task, or other data"
            ]
    if _encode(tokenizer, arithmetic.CHARACTERS) != arithmetic.encode(arithmetic.CHARACTERS):
        return [f"{folder}: expected one token per character, found longer tokens; use a model of the arithmetic task"]
    return []


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:  # as above; the text has no tokens
        return []


def write_tokenizer(folder: PathLike) -> None:
    """Writes `tokenizer_files` into a folder, which is created if it is missing."""
    folder = as_path(folder)
    make_folder(folder)
    for name, text in tokenizer_files().items():
        write_text(folder / name, text)


def main() -> None:
    """Reads the flags and writes the files."""
    parser = argparse.ArgumentParser(description="Write the arithmetic task's tokenizer files.")
    parser.add_argument("--output", required=True, help="folder to write them to")
    output = parser.parse_args().output
    write_tokenizer(output)
    print(f"wrote {', '.join(tokenizer_files())} to {output}")


if __name__ == "__main__":
    main()
