"""Float checkpoints in the formats people have."""

import flax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lnq import checkpoint

TREE = {
    "a/b": {"~c": np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5},
    "d": np.arange(4, dtype=np.int32),
    "e": {"f": np.float32(7.5)},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack", ""])
def test_a_tree_comes_back_names_and_all(tmp_path, suffix):
    tree = {k: v for k, v in TREE.items() if suffix or k != "a/b"}  # orbax: no '/' in its keys
    checkpoint.write(tmp_path / f"x{suffix}", tree)
    restored = checkpoint.read(tmp_path / f"x{suffix}")
    assert restored.keys() == tree.keys()
    if suffix:
        np.testing.assert_array_equal(restored["a/b"]["~c"], TREE["a/b"]["~c"])
    np.testing.assert_array_equal(restored["d"], TREE["d"])
    assert restored["e"]["f"] == 7.5
    assert restored["d"].dtype == np.int32


def test_bfloat16_comes_back_from_safetensors(tmp_path):
    values = np.array([1.5, -3.0], ml_dtypes.bfloat16)
    checkpoint.write(tmp_path / "x.safetensors", {"w": values})
    restored = checkpoint.read(tmp_path / "x.safetensors")["w"]
    assert restored.dtype == values.dtype
    np.testing.assert_array_equal(restored, values)


def test_what_flax_wrote_is_read(tmp_path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(flax.serialization.to_bytes({"params": {"w": jnp.ones((2, 2))}}))
    np.testing.assert_array_equal(checkpoint.read(path)["params"]["w"], np.ones((2, 2)))


def test_lists_become_dicts_of_numbers(tmp_path):
    checkpoint.write(tmp_path / "x.npz", [np.zeros(2), (np.ones(1),)])
    restored = checkpoint.read(tmp_path / "x.npz")
    np.testing.assert_array_equal(restored["1"]["0"], [1.0])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack"])
def test_garbage_is_an_error_that_names_the_file_and_format(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"garbage " * 9)
    with pytest.raises(ValueError, match=rf"x{suffix}: not a {suffix[1:]} checkpoint"):
        checkpoint.read(path)


def test_unknown_formats_are_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write \.pt; give \.safetensors"):
        checkpoint.write(tmp_path / "x.pt", TREE)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read \.pt; give \.safetensors"):
        checkpoint.read(tmp_path / "x.pt")
