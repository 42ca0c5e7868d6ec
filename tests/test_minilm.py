"""The float MiniLM encoder of `examples/minilm.py` against reference numbers."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import minilm

pytestmark = pytest.mark.download


@pytest.fixture(scope="module")
def model() -> tuple[minilm.ApplyFn, dict]:
    return minilm.load()


def test_every_weight_but_the_pooler_is_loaded(model):
    shapes = jax.eval_shape(
        lambda key: minilm.MiniLM().init(key, **minilm.tokenize(["shape"], 8)), jax.random.key(0)
    )
    assert jax.tree.map(np.shape, model[1]) == jax.tree.map(np.shape, shapes["params"])
    assert sum(w.size for w in jax.tree.leaves(model[1])) == 22_713_216 - 384 * 385


def test_word_similarity_of_the_float_model(model):
    assert minilm.wordsim353(*model) == pytest.approx(0.729, abs=0.002)


def test_padding_does_not_change_an_embedding(model):
    apply_fn, params = model
    texts = [" ".join(text.split()[:12]) for text in minilm.sentences()[:4]]
    short, long = (apply_fn(params, minilm.tokenize(texts, length)) for length in (32, 64))
    np.testing.assert_allclose(short, long, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(short, axis=-1), 1, rtol=1e-6)


def test_sentences_are_many_distinct_and_in_a_fixed_order():
    texts = minilm.sentences()
    assert len(texts) == len(set(texts)) >= 600
    assert texts == minilm.sentences()


def test_the_compressed_model_is_as_small_as_promised_and_still_knows_words(tmp_path):
    found = minilm.compress(0.005, 0.003, tmp_path / "minilm.lnq")
    assert found["bits_per_weight_at_0.005"] <= 4.4
    assert found["calibration_deviation"] < 0.005
    assert found["evaluation_deviation"] < 0.0065
    assert found["evaluations"] <= 14
    assert found["wordsim353_compressed"] == pytest.approx(found["wordsim353_float"], abs=0.02)
