"""The command line, as a user types it, in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import lnq
from lnq.cli import app

RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {
        "kernel": RNG.normal(size=(48, 64)).astype(np.float32),
        "bias": RNG.normal(size=64).astype(np.float32),
    },
    "head": {"kernel": RNG.laplace(size=(64, 32)).astype(np.float32)},
}
MODEL = """
import jax.numpy as jnp
def apply(params, x):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return hidden @ params["head"]["kernel"]
"""


def lnq_(*words, code=0):
    """Run a command, check its exit code, return what it printed (also on standard error)."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lnq.checkpoint.write("net.npz", PARAMS)
    (tmp_path / "net_module.py").write_text(MODEL)
    np.save("calib.npy", RNG.normal(size=(16, 48)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack", ""])
def test_every_format_goes_in_and_comes_out(folder, suffix):
    lnq.checkpoint.write(f"in{suffix}", PARAMS)
    lnq_("compress", f"in{suffix}", "net.lnq", "--weight-deviation", 0.001)
    lnq_("decompress", "net.lnq", f"out{suffix}")
    restored = lnq.checkpoint.read(f"out{suffix}")
    assert restored.keys() == PARAMS.keys()
    np.testing.assert_array_equal(restored["dense"]["bias"], PARAMS["dense"]["bias"])
    for name in ("dense", "head"):
        before, after = PARAMS[name]["kernel"].ravel(), restored[name]["kernel"].ravel()
        assert 0.0 < 1 - np.corrcoef(before, after)[0, 1] < 0.003


def test_a_model_and_examples_bound_the_outputs(folder):
    printed = lnq_(
        "compress", "net.npz", "net.lnq", "--model", "net_module:apply", "--calib", "calib.npy",
        "--max-deviation", 0.01, "--eps0", 0.001,
    )  # fmt: skip
    assert "13 evaluations" in printed
    restored = lnq.dequantize(lnq.load("net.lnq"))
    x = np.load("calib.npy")

    def apply(p):
        hidden = jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"][None])
        return hidden @ p["head"]["kernel"]

    deviation = float(lnq.riq.example_deviation(apply(PARAMS), apply(restored)).mean())
    assert 0.009 < deviation < 0.01


def test_a_dry_run_prints_the_real_size_and_writes_nothing(folder):
    before = sorted(os.listdir())
    planned = lnq_("compress", "net.npz", "net.lnq", "--weight-deviation", 0.01, "--dry-run")
    assert sorted(os.listdir()) == before
    assert "nothing written" in planned
    lnq_("compress", "net.npz", "net.lnq", "--weight-deviation", 0.01)
    assert f"{os.path.getsize('net.lnq'):,} bytes" in planned


def test_info_prints_the_rows_and_the_size_of_the_file(folder):
    lnq_("compress", "net.npz", "net.lnq", "--weight-deviation", 0.01, "--select", "head")
    printed = lnq_("info", "net.lnq")
    size = os.path.getsize("net.lnq")
    assert f"{size:,} bytes, {48 * 64 + 64 + 64 * 32:,} weights" in printed
    assert "head/kernel" in printed
    found = json.loads(lnq_("info", "net.lnq", "--json"))
    assert found["bytes"] == size == sum(row["bytes"] for row in found["rows"])
    codes = {row["path"]: row["codes"] for row in found["rows"]}
    assert codes["head/kernel"] == "int8"
    assert codes["dense/kernel"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "missing.lnq"], "No such file"),
        (["info", "net.npz"], "not an lnq file"),
        (["decompress", "net.npz", "out.npz"], "not an lnq file"),
        (["compress", "missing.npz", "x.lnq", "--weight-deviation", "0.01"], "No such file"),
        (["compress", "calib.npy", "x.lnq", "--weight-deviation", "0.01"], "cannot read .npy"),
        (["compress", "net.npz", "x.lnq", "--weight-deviation", "1e-9"], "cannot be reached"),
        (["compress", "net.npz", "x.lnq", "--weight-deviation", "0.1", "--select", "zz"],
         "no leaf"),
        (["compress", "net.npz", "x.lnq", "--model", "net_module:nope", "--calib", "calib.npy",
          "--max-deviation", "0.1"], "give package.module:function"),
        (["compress", "net.npz", "x.lnq", "--model", "no_module:apply", "--calib", "calib.npy",
          "--max-deviation", "0.1"], "No module named"),
        (["compress", "net.npz", "nowhere/x.lnq", "--weight-deviation", "0.1"], "nowhere"),
    ],
)  # fmt: skip
def test_what_fails_says_why_in_one_line_and_exits_with_1(folder, words, message):
    printed = lnq_(*words, code=1)
    lines = [line for line in printed.splitlines() if line.startswith("lnq: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (folder / "x.lnq").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--weight-deviation", "0.1", "--max-deviation", "0.1"],
        ["--model", "net_module:apply", "--max-deviation", "0.1"],
        ["--weight-deviation", "much"],
    ],
)
def test_a_wrong_command_line_exits_with_2(folder, options):
    lnq_("compress", "net.npz", "x.lnq", *options, code=2)


@pytest.mark.slow
def test_demo_writes_a_small_real_file_that_keeps_the_accuracy(folder):
    env = os.environ | {"PYTHONPATH": str(Path(lnq.__file__).parents[1]), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", "from lnq.cli import main; main()", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    printed = done.stdout
    rows = [line.split() for line in printed.splitlines()]
    ours = next(row for row in rows if row[:3] == ["RIQ", "<", "0.005"])
    size = int(ours[3].replace(",", ""))
    assert size == os.path.getsize("demo.lnq") == lnq.info("demo.lnq").bytes
    demo = lnq.demo.load()
    original = sum(leaf.nbytes for _, leaf in lnq.tree.named_leaves(demo.variables))
    assert original / size > 11.0
    restored = lnq.dequantize(lnq.load("demo.lnq"))
    logits = demo.apply_fn(demo.variables, demo.images)
    compressed = demo.apply_fn(restored, demo.images)
    deviation = float(lnq.riq.example_deviation(logits, compressed).mean())
    assert float(ours[7]) == pytest.approx(deviation, abs=1e-4)
    float_hits, hits = (
        (np.asarray(y).argmax(-1) == demo.labels).mean() for y in (logits, compressed)
    )
    assert float_hits > 0.92
    assert hits > float_hits - 0.01
