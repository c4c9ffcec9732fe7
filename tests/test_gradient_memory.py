"""The table of the gradient's temporary memory; tests/test_sequence.py tests the memory itself."""

import pytest

from melt_jax.analysis import gradient_memory
from melt_jax.config import InputError


def test_growth_is_relative_to_half_the_chunks(monkeypatch, capsys):
    sizes = {(chunks, plain): chunks**2 if plain else 3 * chunks for chunks in (2, 4) for plain in (True, False)}
    compiled = lambda config, phase, batch, chunk, chunks, *plain: sizes[chunks, bool(plain)] * 1_000_000
    monkeypatch.setattr(gradient_memory, "temporary_bytes", compiled)
    gradient_memory.print_table(gradient_memory.MINIATURE, ["alignment"], 1, 32, [2, 4])
    _, _, two, four, _ = capsys.readouterr().out.splitlines()
    assert two.split() == ["alignment", "2", "64", "4.0", "6.0", "150.0%"]
    assert four.split() == ["alignment", "4", "128", "16.0", "12.0", "75.0%", "x", "2.00"]


@pytest.mark.parametrize(
    "arguments", [(["phase"], 1, 32, [2]), (["alignment"], 0, 32, [2]), (["alignment"], 1, 32, [])]
)
def test_impossible_tables_are_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        gradient_memory.print_table(gradient_memory.MINIATURE, *arguments)
