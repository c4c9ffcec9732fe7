"""Necessary FLOPs, compared with sums over weights and with compiled programs; the table of chips."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from melt_jax import ModelConfig
from melt_jax.analysis.chips import CHIPS, find_chip
from melt_jax.analysis.flops import causal_entries, forward_flops, step_flops, weight_reads
from melt_jax.analysis.hlo import analyse
from melt_jax.data.batch import Batch
from melt_jax.model.cache import create_cache
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import abstract_model, module_leaves
from melt_jax.training.objectives import Distillation, distillation_loss, distillation_sums, normalize, scored_tokens
from tests.helpers.tiny import TINY as TINY_BLOCKS
from tests.helpers.topology import topology_devices

OURO = ModelConfig()
MELT = dataclasses.replace(OURO, gate="elementwise")
TINY = dataclasses.replace(TINY_BLOCKS, attention_block=512)  # one block: the program's text has all trip counts


def weight_flops(config, loops=None):
    """2 FLOPs for each element of a layer's matrices and of the head in each loop: everything but attention."""
    leaves = module_leaves(abstract_model(config))
    layers = sum(leaf.size for path, leaf in leaves if path.startswith("layers.") and leaf.ndim > 2)
    gates = sum(leaf.size for path, leaf in leaves if path.endswith((".w_z", ".u_z")))
    loops = config.loops if loops is None else loops
    return 2 * (config.loops * layers - (config.first_loop == "copy") * gates + loops * config.vocab * config.width)


@pytest.mark.parametrize("config", [OURO, MELT, TINY, dataclasses.replace(TINY, first_loop="gated", tied=True)])
@pytest.mark.parametrize("logits", [None, 1])
def test_token_multiplies_each_matrix_once_per_loop(config, logits):
    flops = forward_flops(config, entries=0, logits=logits)
    assert flops.total == weight_flops(config, logits) and flops.attention == 0
    width = config.heads * config.head_width
    more = forward_flops(config, entries=10, logits=logits).total - flops.total
    assert more == config.loops * config.layers * 2 * 2 * width * 10


def test_transition_and_gates_add_their_own_flops():
    """The transition projects KV entries from h and from u; gate variants without weights need no FLOPs."""
    projections = 2 * 2 * OURO.width * OURO.kv_heads * OURO.head_width * OURO.loops * OURO.layers
    assert forward_flops(MELT, 1, transition=True).total - forward_flops(MELT, 1).total == projections
    assert forward_flops(MELT, 1).gate == 3 * OURO.layers * 4 * OURO.width**2
    assert forward_flops(dataclasses.replace(OURO, gate="scalar"), 1).gate == 3 * OURO.layers * 4 * OURO.width
    assert forward_flops(dataclasses.replace(OURO, gate="mean"), 1) == forward_flops(OURO, 1)
    with pytest.raises(ValueError, match="gate='none'"):
        forward_flops(OURO, 1, transition=True)


def test_step_counts_teacher_and_student_passes():
    """One forward pass of the teacher and three of the student, or four if chunks are recomputed."""
    tokens, entries = 32 * 10_000, causal_entries(10_000)
    assert entries == sum(range(1, 10_001)) / 10_000 and causal_entries(1, earlier=99) == 100
    teacher, student = forward_flops(OURO, entries).total, forward_flops(MELT, entries).total
    step = step_flops(MELT, "alignment", 32, 10_000, chunk_size=500)
    assert step.total == tokens * (teacher + 4 * student)
    assert step.mfu_flops == tokens * (teacher + 3 * student)
    assert step_flops(MELT, "transition", 32, 10_000, 500).forward > step.forward
    assert step_flops(MELT, "alignment", 32, 10_000).recomputation == 0
    pretraining = step_flops(OURO, "pretraining", 32, 10_000, chunk_size=10_000)
    assert pretraining.total == pretraining.mfu_flops == 3 * tokens * teacher
    with pytest.raises(ValueError, match="found 'aligment'"):
        step_flops(MELT, "aligment", 1, 1)


def test_a_sweep_repeats_all_but_the_head():
    """Sweeps beyond ⌈C/(W + 1)⌉ are not run, and the teacher has none. A window alone needs no FLOPs."""
    length, chunk = 64, 8
    step = lambda **changes: step_flops(dataclasses.replace(MELT, **changes), "alignment", 1, length, chunk)
    plain, entries = step(), causal_entries(length)
    assert step(window=20) == step(window=20, sweeps=3) == plain
    more = length * (forward_flops(MELT, entries).total - forward_flops(MELT, entries).head)
    for sweeps, window, run in ((2, 0, 2), (9, 3, 2), (9, 0, 8)):
        swept = step(sweeps=sweeps, window=window)
        assert swept.forward == plain.forward + (run - 1) * more and swept.teacher == plain.teacher
        assert swept.recomputation == swept.forward and swept.backward == 2 * swept.forward


def test_each_pass_over_a_chunk_reads_the_weights():
    """The teacher's pass and the student's three, or two without recomputation; attention reads no weights."""
    student, teacher = weight_flops(MELT) / 2, weight_flops(OURO) / 2
    assert weight_reads(MELT, "alignment", 10_000, 500) == 20 * (teacher + 3 * student)
    assert weight_reads(MELT, "alignment", 10_000, 128) == 79 * (teacher + 3 * student)
    assert weight_reads(MELT, "alignment", 500, 512) == teacher + 2 * student
    assert weight_reads(OURO, "pretraining", 512, 512) == 2 * teacher


@pytest.mark.parametrize(
    ("changes", "passes", "entries"),
    [
        ({"gate": "none"}, 1, 0),
        ({"gate": "none", "first_loop": "gated"}, 1, 0),
        ({"first_loop": "gated"}, 1, 0),
        ({}, 1, 0),
        ({"window": 5}, 1, 5),
        ({"window": 2, "sweeps": 2}, 2, 2 + 8),
    ],
)
def test_formula_matches_a_compiled_chunk(changes, passes, entries):
    """The program attends to every slot and the whole chunk, and computes the gate in loop 1 even if it is unused.

    The window's entries come on top, and with several sweeps the chunk's entries of the sweep before.
    """
    config = dataclasses.replace(TINY, **changes)
    batch, chunk, slots = 2, 8, 24

    def chunk_logits(model, tokens):
        cache = create_cache(config, batch, slots, jnp.float32)
        return model.logits(run_chunk(model, tokens, cache, 8).hidden)

    tokens = jax.ShapeDtypeStruct((batch, chunk), "int32")
    program = analyse(jax.jit(chunk_logits).lower(abstract_model(config), tokens).compile().as_text())
    gated = dataclasses.replace(config, first_loop="gated")
    needed = forward_flops(gated, entries=slots + chunk + entries, sweeps=passes)
    assert program.flops == batch * chunk * needed.total
    assert set(program.flops_by_precision()) == {"f32 highest"}
    scopes = program.flops_by_scope(("gate", "attention", "mlp"))
    assert scopes["mlp"] == batch * chunk * needed.mlp and scopes["other"] == batch * chunk * needed.head


@functools.cache
def alignment_program(length, chunk):
    """Returns the student's config and the compiled gradient of the alignment's loss of one sequence."""
    student = dataclasses.replace(TINY, first_loop="gated")

    def loss(student, teacher, batch):
        sums = distillation_sums(student, teacher, batch, Distillation(chunk, "sum"))
        return distillation_loss(normalize(sums, scored_tokens(batch)), beta=0.1)

    tokens = jax.ShapeDtypeStruct((1, length), "int32")
    arguments = abstract_model(student), abstract_model(dataclasses.replace(TINY, gate="none"))
    text = jax.jit(jax.value_and_grad(loss)).lower(*arguments, Batch(tokens, tokens, tokens)).compile().as_text()
    return student, analyse(text)


@pytest.mark.parametrize("chunks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_formula_matches_a_compiled_step(chunks):
    """The program computes the formula's FLOPs and three known extras.

    - Scores of invisible KV entries are computed and masked: those of the chunk and of all slots. A student whose
      sequence is one chunk has no slots; its teacher always has.
    - The backward pass recomputes both models' logits, so that those of one loop exist at a time. With several chunks
      this replaces the recomputation of the student's.
    - The backward pass of attention recomputes the scores, which is half of its forward pass.
    """
    chunk = 8
    length = chunk * chunks
    student, program = alignment_program(length, chunk)
    teacher = dataclasses.replace(student, gate="none")
    step = step_flops(student, "alignment", 1, length, chunk)
    attention = lambda config, entries: length * (forward_flops(config, entries).attention)
    invisible = lambda config, entries: attention(config, entries) - attention(config, causal_entries(length))
    masked = invisible(teacher, length + chunk)
    masked += 3 * invisible(student, length) if chunks == 1 else 4 * invisible(student, length + chunk)
    logits = length * forward_flops(teacher, 1).head * (2 if chunks == 1 else 1)
    scores = attention(student, length if chunks == 1 else length + chunk) / 2
    assert program.flops == step.total + masked + logits + scores
    assert not program.unknown_loops


# Chips


@pytest.mark.parametrize(
    ("kind", "name", "flops"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU7x", "tpu7x", 2307e12 / 2),
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
    ],
)
def test_device_kinds_identify_chips(kind, name, flops):
    chip = find_chip(kind)
    assert chip.name == name and chip.device_flops == flops


def test_chips_have_distinct_kinds():
    """A CPU is not in the table, and every figure is in the right unit."""
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert find_chip(jax.devices("cpu")[0].device_kind) is None
    for chip in CHIPS:  # a figure in the wrong unit would change the ratio by orders of magnitude
        assert 100 < chip.flops / chip.memory_bandwidth < 600
        assert math.isclose(chip.device_memory * chip.devices, chip.memory)


@pytest.mark.parametrize(
    ("topology", "name"),
    [("v4:2x2x1", "v4"), ("v5e:2x2", "v5e"), ("v5p:2x2x1", "v5p"), ("v6e:2x2", "v6e"), ("tpu7x:2x2x1", "tpu7x")],
)
def test_described_devices_have_chips(topology, name):
    assert find_chip(topology_devices(topology)[0].device_kind).name == name
