"""The package reproduces every array of tests/golden, from the public implementation and from a float64 one."""

import pytest

from tests.golden import generate
from tests.helpers.check_goldens import check_folder
from tests.helpers.marks import slow

FOLDERS = generate.folders()
MARKED = [f if f.name == "ouro_tiny" else slow(f) for f in FOLDERS]


def test_all_folders_exist():
    assert [f.name for f in FOLDERS] == [
        "melt_tiny",
        "melt_tiny_gqa",
        "ouro_tiny",
        "ouro_tiny_gqa",
        "ouro_tiny_sharded",
        "window_tiny",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_reference_data_can_be_recomputed(folder):
    """Every stored array follows from the folder's weights and inputs, by code that shares nothing with melt_jax."""
    failed = [line for line in generate.differences(folder) if line[1] > line[2]]
    assert not failed


@pytest.mark.parametrize("folder", MARKED, ids=lambda folder: folder.name)
def test_package_matches_the_reference_data(folder):
    comparisons = list(check_folder(folder))
    failed = [str(comparison) for comparison in comparisons if not comparison.passed]
    assert len(comparisons) > 20 and not failed, "\n" + "\n".join(failed)
