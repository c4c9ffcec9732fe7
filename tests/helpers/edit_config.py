"""Editing the config.json of a folder that melt_jax wrote."""

import json
import pathlib

from melt_jax.digests import DIGESTS


def edit_config(folder: pathlib.Path, **changes: object) -> None:
    """Changes values of config.json and removes the folder's record, to which the file no longer belongs."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=1))
    (folder / DIGESTS).unlink()
