"""ACIQ step by step, on three models: what each closed form gains over plain rounding.

    python examples/benchmarks/aciq.py resnet efficientnet minilm --json docs/results/aciq.json

The steps are the paper's: plain rounding to the range of the values, then clipped data, then
corrected means of weights and outputs, then bits shared among channels; each keeps those before it.
Rows named after one option change that option of the third step; published bits, of the fourth.
`per channel` gives every channel of the data a grid (the paper's setting), `per tensor` gives one
for all, and products of int8. Widths W.A. are those of weights and data; first and last site have 8
bits at least. Batch-norm is folded first.

* `resnet`: the demo's Fashion-MNIST ResNet. Signal to noise (decibels) and KL (nats) of the logits
  against those of the float model on all 512 calibration images, calibrated with 256 of them, mean
  over three draws; accuracy on the 10 000 test images, for the first draw. The test set is read as
  in `train_fashion_mnist.py`.
* `efficientnet`: EfficientNet-Lite0 on crops of 96 x 96: the same on 64 calibration crops, 32 to
  calibrate; agreement with the float model's top-1 and KL on 128 crops of other photographs.
* `minilm`: all-MiniLM-L6-v2, calibrated with 64 sentences: 1 - cosine of the embeddings of 64
  others, and WordSim353. In a process of its own: seconds of calibrating and quantizing from cold,
  then of quantizing to other widths, and the functions which that compiled.

The results are merged into the JSON file, model by model.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from machine import write_json

import lnq
from lnq import aciq, calibration, clipping, demo, distortion, tuning
from lnq.calibration import Calibration
from lnq.demo.data import read_fashion_mnist
from lnq.demo.resnet import ResNet

Row = dict[str, Any]
Options = dict[str, Any]

EXAMPLES = Path(__file__).parent.parent
DEBIAN = "/usr/share/datasets/fashion-mnist"
GRIDS = {"per channel": True, "per tensor": False}

NAIVE: Options = {"act_clip": "max", "correct": "none", "correct_acts": False}
CLIPPED = NAIVE | {"act_clip": "auto"}
CORRECTED = CLIPPED | {"correct": "mean", "correct_acts": True}
ALLOCATED = CORRECTED | {"allocate": clipping.greedy_bits}
LADDER = {
    "naive": NAIVE,
    "+ clipping": CLIPPED,
    "+ bias correction": CORRECTED,
    "+ bit allocation": ALLOCATED,
}
OTHERS = {
    "act_clip laplace": CORRECTED | {"act_clip": "laplace"},
    "act_clip mix": CORRECTED | {"act_clip": "mix"},
    "act_clip kld": CORRECTED | {"act_clip": "kld"},
    "weight_clip auto": CORRECTED | {"weight_clip": "auto"},
    "correct norm": CORRECTED | {"correct": "norm"},
    "correct_acts no": CORRECTED | {"correct_acts": False},
    "published bits": ALLOCATED | {"allocate": clipping.published_bits},
}


class Task(NamedTuple):
    """A classifier and what to measure on it.

    Attributes:
      apply_fn: ``apply_fn(variables, images) -> logits``.
      variables: Batch-norm folded.
      quantized: Jitted, for quantized variables.
      batch: Images per call.
      images: Calibration images; all of them measure.
      draws: Which of them calibrate, one array of indices for each draw.
      judge: Further numbers of a row, from a function of images to logits.
    """

    apply_fn: Callable[..., Any]
    variables: dict
    quantized: Callable[..., Any]
    batch: int
    images: np.ndarray
    draws: list[np.ndarray]
    judge: Callable[[Callable[[np.ndarray], jax.Array]], Row]


def logits(task: Task, apply: Callable[..., Any], variables: Any, images: np.ndarray) -> jax.Array:
    """Batch by batch; the last may be shorter."""
    starts = range(0, len(images), task.batch)
    return jnp.concatenate([apply(variables, images[i : i + task.batch]) for i in starts])


def calibrations(task: Task) -> list[Calibration]:
    """One for each draw."""
    found = []
    for draw in task.draws:
        chosen = [task.images[draw[i : i + task.batch]] for i in range(0, len(draw), task.batch)]
        found.append(calibration.calibrate(task.apply_fn, task.variables, chosen))
    return found


def classifier(task: Task, settings: list[tuple[str, str, Options]]) -> Iterator[Row]:
    """The float model's row, then one for each grid, name and options."""
    apply = jax.jit(task.apply_fn)
    reference = logits(task, apply, task.variables, task.images)
    yield {"name": "float", **task.judge(partial(logits, task, apply, task.variables))}
    found = calibrations(task)
    for grid, name, options in settings:
        yield measure(task, reference, found, grid, name, options)


def measure(
    task: Task,
    reference: jax.Array,
    found: list[Calibration],
    grid: str,
    name: str,
    options: Options,
) -> Row:
    """Quantize with each calibration; judge the first."""
    options = {"per_channel": GRIDS[grid], **options}
    trees = [aciq.quantize(task.apply_fn, task.variables, calib, **options) for calib in found]
    outputs = [logits(task, task.quantized, qtree, task.images) for qtree, _ in trees]
    sqnr = [float(distortion.sqnr_db(reference, out)) for out in outputs]
    kl = [float(distortion.kl(reference, out)) for out in outputs]
    return {
        "setting": grid,
        "name": name,
        **widths(trees[0][1], options),
        "sqnr_db": float(np.mean(sqnr)),
        "kl": float(np.mean(kl)),
        "sqnr_db_seeds": sqnr,
        "kl_seeds": kl,
        **task.judge(partial(logits, task, task.quantized, trees[0][0])),
    }


def widths(info: aciq.ACIQInfo, options: Options) -> Row:
    """What was asked for, and the mean over the sites between the first and the last."""
    inner = info.rows[1:-1]
    asked = f"W{options.get('weight_bits', 4)}A{options.get('act_bits', 4) or 32}"
    return {
        "widths": asked,
        "weight_bits": float(np.mean([row.weight_bits for row in inner])),
        "act_bits": float(np.mean([row.act_bits for row in inner])),
    }


def share(right: np.ndarray, name: str) -> Row:
    """A share of examples and its standard error."""
    p = float(right.mean())
    return {name: p, "standard_error": sqrt(p * (1 - p) / len(right))}


def draw(total: int, count: int) -> list[np.ndarray]:
    """Three draws without replacement."""
    return [np.random.default_rng(s).choice(total, count, replace=False) for s in range(3)]


def resnet(args: argparse.Namespace) -> Iterator[Row]:
    loaded = demo.load()
    images, labels = read_fashion_mnist(args.data, "t10k")
    apply_fn = ResNet().apply

    def judge(predict: Callable[[np.ndarray], jax.Array]) -> Row:
        return share(np.asarray(predict(images)).argmax(-1) == labels, "accuracy")

    task = Task(
        apply_fn,
        tuning.fold(apply_fn, loaded.variables, loaded.calib[:1])[0],
        jax.jit(lnq.quantized(apply_fn)),
        500,
        loaded.calib,
        draw(len(loaded.calib), 256),
        judge,
    )
    settings = [(grid, *item) for grid in GRIDS for item in (LADDER | OTHERS).items()]
    yield from classifier(task, settings)


def efficientnet(args: argparse.Namespace) -> Iterator[Row]:
    net = example("efficientnet")
    apply_fn, variables = net.load()
    calib, evaluation = net.crops(96, 64, 128)
    variables, _ = tuning.fold(apply_fn, variables, calib[:1])
    apply = jax.jit(apply_fn)
    batches = [evaluation[i : i + 32] for i in range(0, len(evaluation), 32)]
    reference = jnp.concatenate([apply(variables, batch) for batch in batches])

    def judge(predict: Callable[[np.ndarray], jax.Array]) -> Row:
        out = predict(evaluation)
        same = np.asarray(out.argmax(-1) == reference.argmax(-1))
        return share(same, "agreement") | {"evaluation_kl": float(distortion.kl(reference, out))}

    task = Task(
        apply_fn,
        variables,
        jax.jit(lnq.quantized(apply_fn)),
        32,
        calib,
        draw(len(calib), 32),
        judge,
    )
    wider = {
        f"W{bits}A{bits}, all": ALLOCATED | {"weight_bits": bits, "act_bits": bits}
        for bits in (8, 6)
    }
    settings = [(grid, *item) for grid in GRIDS for item in (LADDER | wider).items()]
    yield from classifier(task, settings)


SENTENCE_ROWS = {  # grid, options
    "W8A8": ("per tensor", {"weight_bits": 8, "act_bits": 8}),
    "W8A8 naive": ("per tensor", NAIVE | {"weight_bits": 8, "act_bits": 8}),
    "W4A8": ("per tensor", {"act_bits": 8}),
    "W4A4": ("per tensor", {}),
    "W4A4, correct_acts": ("per tensor", {"correct_acts": True}),
    "W4A8, correct_acts": ("per tensor", {"correct_acts": True, "act_bits": 8}),
    "W4A4 naive": ("per tensor", NAIVE),
    "W4A4 per channel": ("per channel", {}),
    "W4A4 per channel, + bit allocation": ("per channel", ALLOCATED),
    "W4": ("per tensor", {"act_bits": None}),
    "W4, groups of 128": ("per tensor", {"act_bits": None, "group_size": 128}),
}


def minilm(args: argparse.Namespace) -> Iterator[Row]:
    yield {"name": "timing", **fresh("timing")}
    model = example("minilm")
    apply_fn, params = model.load()
    texts = model.sentences()
    calib, held_out = model.tokenize(texts[:64]), model.tokenize(texts[64:128])
    reference = jax.jit(apply_fn)(params, held_out)
    yield {"name": "float", "wordsim353": model.wordsim353(apply_fn, params)}

    run = lnq.quantized(apply_fn)
    found = calibration.calibrate(apply_fn, params, calib, mask=real_tokens)
    for name, (grid, options) in SENTENCE_ROWS.items():
        options = {"per_channel": GRIDS[grid], **options}
        qtree, info = aciq.quantize(apply_fn, params, found, **options)
        embedded = jax.jit(run)(qtree, held_out)
        yield {
            "setting": grid,
            "name": name,
            **widths(info, options),
            "deviation": float(1 - (reference * embedded).sum(-1).mean()),
            "wordsim353": model.wordsim353(run, qtree),
            "int8_sites": sum(row.status == "int8" for row in info.rows),
            "sites": len(info.rows),
        }


def timing(args: argparse.Namespace) -> Iterator[Row]:
    """MiniLM from cold, then to other widths from the same statistics."""
    model = example("minilm")
    apply_fn, params = model.load()
    calib = model.tokenize(model.sentences()[:64])
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    qtree, info = aciq.quantize(apply_fn, params, calib, mask=real_tokens)
    jax.block_until_ready(qtree)
    cold, first = time.perf_counter() - start, len(compiled)
    start = time.perf_counter()
    qtree, _ = aciq.quantize(apply_fn, params, info.calibration, weight_bits=8, act_bits=6)
    jax.block_until_ready(qtree)
    yield {
        "cold_seconds": cold,
        "cold_compilations": first,
        "again_seconds": time.perf_counter() - start,
        "again_compilations": len(compiled) - first,
        "again_compiled": compiled[first:],
    }


def real_tokens(batch: dict[str, jax.Array]) -> jax.Array:
    return batch["mask"]


def example(name: str) -> Any:
    """A module of `examples`; benchmarks may have one of the same name."""
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def fresh(name: str) -> Row:
    """The only row of a model, from a new process without a compilation cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


MODELS = {"resnet": resnet, "efficientnet": efficientnet, "minilm": minilm}


def text(row: Row) -> str:
    shown = [f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
    return "  ".join(s for (k, v), s in zip(row.items(), shown, strict=True) if k[-5:] != "seeds")


def merge(path: Path | None, name: str, part: Row) -> None:
    """Replace one model's part of the file."""
    before = json.loads(path.read_text()) if path and path.exists() else {}
    before.pop("made_with", None)
    write_json(path, before | {name: part}, "jax", "flax")


def run_parts(doc: str | None, parts: Mapping[str, Callable[[argparse.Namespace], Any]]) -> None:
    """Run the parts that the command line names, and write each row as it comes."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=parts, metavar="part")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LNQ_DATA", DEBIAN)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in args.parts:
        begun, rows = time.perf_counter(), []
        for row in parts[name](args):
            rows.append(row)
            print(text({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
            merge(args.json, name, {"seconds": time.perf_counter() - begun, "rows": rows})


def main() -> None:
    if sys.argv[1:2] == ["timing"]:
        print(json.dumps(next(timing(argparse.Namespace()))))
    else:
        run_parts(__doc__, MODELS)


if __name__ == "__main__":
    main()
