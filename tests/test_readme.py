"""What the README tells a reader to run on data of their own runs as it stands there."""

import json
import os
import pathlib
import re
import subprocess
import sys

from melt_jax.checkpoints.orbax import default_chunk, open_model
from melt_jax.data.records import open_records

TOP = pathlib.Path(__file__).parent.parent


def test_files_of_both_forms_are_prepared_and_trained_on_for_ten_steps(tmp_path):
    (script,) = re.findall(r"```sh\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    for name in ("melt_jax", "configs"):
        (tmp_path / name).symlink_to(TOP / name)
    script = re.sub(r"^python", sys.executable, script, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert "200 documents read" in done.stdout
    manifest = json.loads((tmp_path / "data/few/manifest.json").read_text())
    assert manifest["counts"]["malformed"] == 0 and manifest["package"] == "0.1.0"
    row = open_records(tmp_path / "data/few")[0]
    assert row.tokens.shape == (128,) and 0 < row.loss_mask.sum() < 128

    steps = [(tmp_path / "runs/few" / phase / "metrics.jsonl").read_text() for phase in ("transition", "alignment")]
    assert [json.loads(lines.splitlines()[-1])["step"] for lines in steps] == [6, 4]
    folder = tmp_path / "runs/few/alignment/model"
    assert default_chunk(folder, open_model(folder).config) == 16
