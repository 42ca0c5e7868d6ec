"""The conversion of `examples/convert_minilm.py`: same parameters, padding, one way to train."""

import sys
from functools import partial
from itertools import repeat
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import convert_minilm
import minilm
import texts

from lnq.attention import attention_fn, lln

pytestmark = pytest.mark.download

EXAMPLE = {"stats": "example", "constants": lln.constants(32)}


@pytest.fixture(scope="module")
def model() -> tuple[minilm.ApplyFn, dict]:
    return minilm.load()


@pytest.mark.parametrize("diagonal", [False, True])
def test_conversion_keeps_names_and_shapes_of_parameters(model, diagonal):
    converted = minilm.MiniLM(attention_fn=partial(attention_fn, diagonal=diagonal))
    shapes = jax.eval_shape(
        lambda key: converted.init(key, **minilm.tokenize(["shape"], 8)), jax.random.key(0)
    )
    assert jax.tree.map(np.shape, model[1]) == jax.tree.map(np.shape, shapes["params"])


@pytest.mark.parametrize("diagonal", [False, True])
def test_padding_and_other_sentences_do_not_change_an_embedding(model, diagonal):
    apply_fn = convert_minilm.convert(diagonal=diagonal, **EXAMPLE)
    several = [" ".join(text.split()[:12]) for text in minilm.sentences()[:4]]
    short, long = (apply_fn(model[1], minilm.tokenize(several, length)) for length in (32, 64))
    alone = apply_fn(model[1], minilm.tokenize(several[:1], 32))
    np.testing.assert_allclose(short, long, atol=1e-5)
    np.testing.assert_allclose(short[:1], alone, atol=1e-5)
    softmax = model[0](model[1], minilm.tokenize(several, 32))
    assert convert_minilm.loss_fn(short, softmax) > 0.01


def test_some_steps_on_one_batch_reduce_its_loss_and_leave_the_tables(model):
    teacher, params = model
    student = convert_minilm.convert(diagonal=False, **EXAMPLE)
    batch = minilm.tokenize(minilm.sentences()[:8], 24)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedule
        trained, losses = convert_minilm.distill(student, teacher, params, repeat(batch, 5), 5)
    assert losses[-1] < losses[0]
    assert trained["word"] is params["word"]


def test_what_is_reported_on_is_not_trained_on():
    news, pool = minilm.sentences(), convert_minilm.unlabelled()
    kept = {*news[convert_minilm.CHOSEN], *news[convert_minilm.HELD_OUT]}
    assert len(kept) == 64 + 128
    assert not kept & set(pool)
    assert len(pool) == len(news) - len(kept) + 23_703


def test_opinions_and_plays():
    assert [len(texts.opinions(name)) for name in ("amazon", "movie", "nyt", "tweets")] == [
        3_708,
        10_605,
        5_190,
        4_200,
    ]
    assert all(-4 <= score <= 4 for score, _ in texts.opinions())
    plays = texts.plays()
    assert len(plays) == 42
    assert "To be, or not to be" in plays["hamlet"]
