"""The recurrence of the latent in float64, with and without jit: convexity, limits, closed forms."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from melt_jax import run_sequence
from melt_jax.analysis.flops import forward_flops
from melt_jax.model.gate import VARIANTS, Gate, Variant, update_latent
from melt_jax.model.model import Initializer, init_model
from tests.helpers.tiny import TINY

SHAPES = ((1, 1, 4), (2, 5, 16), (3, 2, 33))  # B, C, D
LOOPS = 5


def make_gate(width, seed, bias=0.0):
    gate = Gate(dataclasses.replace(TINY, width=width), Initializer(jax.random.key(seed), 1.0, jnp.float64))
    gate.b_z[...] = gate.b_z[...] + bias
    return gate


def make_inputs(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((LOOPS, *shape)))


def latents(step, kind, first_loop, gate, inputs):
    """h¹ … hᵀ as [T, B, C, D], and the gate openness [T, B, C]."""
    h, out = jnp.zeros_like(inputs[0]), []
    for t, u in enumerate(inputs, start=1):
        h, gate_openness = step(kind, first_loop, gate, u, h, jnp.int32(t))
        out.append((np.asarray(h), np.asarray(gate_openness)))
    return tuple(map(np.stack, zip(*out)))


@pytest.mark.usefixtures("float64")
class GateTest(chex.TestCase):
    def step(self):
        return self.variant(update_latent, static_argnums=(0, 1))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(kind=tuple(VARIANTS), first_loop=("copy", "gated"), seed=(0, 1, 2))
    def test_latent_is_between_its_inputs(self, kind, first_loop, seed):
        shape = SHAPES[seed]
        inputs = make_inputs(shape, seed)
        h, gate_openness = latents(self.step(), kind, first_loop, make_gate(shape[-1], seed), inputs)
        seen = inputs if first_loop == "copy" else np.concatenate([np.zeros_like(inputs[:1]), inputs])
        skip = len(seen) - LOOPS
        low = np.minimum.accumulate(seen)[skip:]
        high = np.maximum.accumulate(seen)[skip:]
        rounding = 1e-12 * np.abs(inputs).max()
        self.assertTrue((h >= low - rounding).all() and (h <= high + rounding).all())
        self.assertTrue((gate_openness >= 0).all() and (gate_openness <= 1).all())

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(kind=("elementwise", "scalar"), seed=(0, 1, 2))
    def test_z_one_keeps_and_z_zero_overwrites(self, kind, seed):
        shape = SHAPES[seed]
        inputs = make_inputs(shape, seed)
        kept, closed = latents(self.step(), kind, "copy", make_gate(shape[-1], seed, bias=1e4), inputs)
        np.testing.assert_array_equal(kept, np.broadcast_to(inputs[0], kept.shape))
        np.testing.assert_array_equal(closed[1:], 0)
        overwritten, opened = latents(self.step(), kind, "copy", make_gate(shape[-1], seed, bias=-1e4), inputs)
        np.testing.assert_array_equal(overwritten, inputs)
        np.testing.assert_array_equal(opened, 1)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(kind=("elementwise", "scalar"), first_loop=("copy", "gated"), seed=(0, 1, 2))
    def test_one_step_follows_the_equation(self, kind, first_loop, seed):
        """z = σ(u W_z + h U_z + b_z); the scalar gate applies the first output column to the whole vector."""
        shape = SHAPES[seed]
        gate = make_gate(shape[-1], seed, bias=0.3)
        w, v, b = (np.asarray(x[...]) for x in (gate.w_z, gate.u_z, gate.b_z))
        u, h, *_ = make_inputs(shape, seed)
        for t in (1, 2):
            z = 1 / (1 + np.exp(-(np.asarray(u) @ w + np.asarray(h) @ v + b[None, None])))
            z = z if kind == "elementwise" else z[..., :1]
            z = np.zeros_like(z) if t == 1 and first_loop == "copy" else z
            want = z * h + (1 - z) * u
            args = (kind, first_loop, gate, u, h, jnp.int32(t))
            got, gate_openness = self.step()(*args)
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(gate_openness, (1 - z).mean(-1), rtol=1e-11, atol=1e-12)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0, 1, 2)
    def test_fixed_gates_have_closed_forms(self, seed):
        """`mean` is the mean of the inputs, `ema` 0.8ᵗ⁻¹ u¹ + Σ 0.2 · 0.8ᵗ⁻ˢ uˢ, `last` the last input."""
        inputs = make_inputs(SHAPES[seed], seed)
        steps = np.arange(1, LOOPS + 1)
        ema = np.where(steps[:, None] >= steps, 0.2 * 0.8 ** (steps[:, None] - steps.astype(float)), 0)
        ema[:, 0] *= 5
        weights = {"mean": np.tri(LOOPS) / steps[:, None], "ema": ema, "last": np.eye(LOOPS)}
        for kind, weight in weights.items():
            h, gate_openness = latents(self.step(), kind, "copy", None, inputs)
            np.testing.assert_allclose(
                h, np.einsum("ts,sbcd->tbcd", weight, inputs), rtol=1e-12, atol=1e-13, err_msg=kind
            )
            np.testing.assert_allclose(gate_openness[:, 0, 0], np.diag(weight), rtol=1e-12, atol=1e-13, err_msg=kind)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*VARIANTS)
    def test_first_loop_copies_or_gates(self, kind):
        """`copy` returns u for any latent; `gated` with h⁰ = 0 returns (1 − z) ⊙ u."""
        gate, (u, h, *_) = make_gate(16, 0), make_inputs(SHAPES[1], 0)
        copied, _ = self.step()(kind, "copy", gate, u, h, jnp.int32(1))
        np.testing.assert_array_equal(copied, u)
        gated, gate_openness = self.step()(kind, "gated", gate, u, jnp.zeros_like(u), jnp.int32(1))
        np.testing.assert_allclose((np.asarray(gated) / u).mean(-1), gate_openness, rtol=1e-10)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("elementwise", "scalar")
    def test_tokens_do_not_mix(self, kind):
        """The gradient of a token's latent is zero in the inputs of other tokens."""
        gate, (u, h, *_) = make_gate(16, 0), make_inputs(SHAPES[1], 0)
        one = lambda u, h: update_latent(kind, "copy", gate, u, h, jnp.int32(2))[0][0, 2].sum()
        for gradient in self.variant(jax.grad(one, argnums=(0, 1)))(u, h):
            assert np.abs(gradient[0, 2]).min() > 0
            others = np.asarray(gradient).copy()
            others[0, 2] = 0
            np.testing.assert_array_equal(others, 0)

    def test_bfloat16_is_computed_in_float32(self):
        gate, (u, h, *_) = make_gate(16, 0), make_inputs(SHAPES[1], 0)
        low = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
        got, gate_openness = update_latent("elementwise", "copy", low(gate), low(u), low(h), jnp.int32(2))
        want, _ = update_latent("elementwise", "copy", gate, u, h, jnp.int32(2))
        self.assertEqual((got.dtype, gate_openness.dtype), (jnp.bfloat16, jnp.float32))
        # Gate inputs, weights and the result are rounded to bfloat16: 2⁻⁹ of numbers up to about 4.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2**-4)


@pytest.mark.slow
def test_variant_needs_only_its_entry(monkeypatch):
    """A variant with weights, added to `VARIANTS` alone, has its gate in a model, runs and is counted."""
    half = lambda gate, u, latent, loop: VARIANTS["elementwise"].z(gate, u, latent, loop) / 2
    monkeypatch.setitem(VARIANTS, "half", Variant(half, None))
    configs = {kind: dataclasses.replace(TINY, gate=kind) for kind in ("half", "elementwise")}
    models = {kind: init_model(config, jax.random.key(0)) for kind, config in configs.items()}
    hidden = {kind: run_sequence(model, jnp.ones((1, 4), jnp.int32), 4).hidden for kind, model in models.items()}
    assert np.max(np.abs(hidden["half"] - hidden["elementwise"])) > 1e-6
    assert forward_flops(configs["half"], 4).gate == forward_flops(configs["elementwise"], 4).gate > 0
