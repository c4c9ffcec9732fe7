"""The package reproduces the public reference implementation and a float64 one: every array of tests/golden."""

import pytest

from tests.helpers.check_goldens import GOLDEN, check_folder

FOLDERS = sorted(folder for folder in GOLDEN.iterdir() if folder.is_dir())


def test_all_folders_exist():
    assert [f.name for f in FOLDERS] == [
        "melt_tiny",
        "melt_tiny_gqa",
        "ouro_tiny",
        "ouro_tiny_gqa",
        "ouro_tiny_sharded",
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_reference_data(folder):
    comparisons = list(check_folder(folder))
    failed = [str(comparison) for comparison in comparisons if not comparison.passed]
    assert len(comparisons) > 20 and not failed, "\n" + "\n".join(failed)
