"""A sequence over two devices gives what one device gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lnq.attention import lln, sharded

DEVICES, LENGTH = 2, 24
PIECE = P(None, "sequence")
RNG = np.random.default_rng(0)
Q = jnp.asarray(RNG.normal(size=(3, LENGTH, 4, 8)), jnp.float32)
K, V = (jnp.asarray(RNG.normal(size=(3, LENGTH, 2, n)), jnp.float32) + 1.0 for n in (8, 5))
MASK = jnp.asarray(RNG.random((3, LENGTH)) < 0.6).at[:, :12].set(False)  # nothing on the first


def split(attend, **options):
    mesh = Mesh(jax.devices()[:DEVICES], ("sequence",))

    def run(q, k, v, mask):
        return attend(q, k, v, key_mask=mask, axis_name="sequence", **options)

    specs = PIECE, PIECE, PIECE, PIECE
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PIECE))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["lln_attention", "lln_diag_attention"])
def test_two_devices_give_what_one_gives_and_so_do_gradients(name, causal):
    options = {"alpha": 2.1, "beta": 1.7, "causal": causal}
    options |= {"block_size": 4} if name == "lln_diag_attention" else {"chunk_size": 5}
    one, two = (
        partial(getattr(lln, name), **options),
        split(getattr(sharded, name), **options),
    )
    for mask in (jnp.ones_like(MASK), MASK):
        np.testing.assert_allclose(
            two(Q, K, V, mask), one(Q, K, V, key_mask=mask), rtol=1e-5, atol=1e-5
        )

    def moment(attend, q, k, v):
        return jnp.mean(jnp.sin(attend(q, k, v)) ** 2)

    slopes = [
        jax.jit(jax.grad(partial(moment, attend), (0, 1, 2)))(Q, K, V)
        for attend in (partial(one, key_mask=MASK), lambda *a: two(*a, MASK))
    ]
    for ours, theirs in zip(*slopes, strict=True):
        assert np.abs(theirs).max() > 1e-4
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_what_devices_exchange_does_not_grow_with_the_sequence():
    """Bytes of all collectives in the compiled program, at one length and at four times that."""

    def exchanged(length, causal):
        attend = split(sharded.lln_attention, alpha=2.1, beta=1.7, causal=causal)
        args = [jax.ShapeDtypeStruct((3, length, 2, 8), jnp.float32)] * 3
        text = attend.lower(*args, jax.ShapeDtypeStruct((3, length), bool)).compile().as_text()
        return sorted(
            line.split(" = ")[1].split(" ")[0]
            for line in text.splitlines()
            if "all-reduce(" in line or "all-gather(" in line
        )

    for causal in (False, True):
        assert exchanged(32, causal) == exchanged(128, causal) != []


def test_a_block_must_not_reach_into_the_next_device():
    with pytest.raises(ValueError, match="block_size: 5 must divide the 12 tokens"):
        split(sharded.lln_diag_attention, alpha=2.0, beta=2.0, block_size=5)(Q, K, V, MASK)
