"""Train a decoder with LLN+Diag attention on Shakespeare, letter by letter, and let it write.

    python examples/shakespeare.py

Three layers, width 128; about ten minutes on a CPU. Three plays are left out, to judge by. It
writes by the recurrent form: a letter takes the same time and memory however many came before, and
has the logits of the whole sequence read at once, which is checked.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import texts
from flax import linen as nn
from transformer import Transformer, adam, lln_attention, make_step, split

LEFT_OUT = "hamlet", "as_you_like_it", "henry_v"
LENGTH, WIDTH = 128, 128


def characters() -> tuple[np.ndarray, np.ndarray, str]:
    """Training text and the plays left out, as places in a string of all letters; the string."""
    plays = texts.plays()
    letters = "".join(sorted(set("".join(plays.values()))))
    place = np.zeros(128, np.int32)
    place[[ord(letter) for letter in letters]] = np.arange(len(letters))

    def numbers(names: list[str]) -> np.ndarray:
        return place[
            np.frombuffer("".join(plays[name] for name in names).encode("ascii"), np.uint8)
        ]

    rest = [name for name in plays if name not in LEFT_OUT]
    return numbers(rest), numbers(list(LEFT_OUT)), letters


def cut(text: np.ndarray, starts: np.ndarray, length: int) -> tuple[Any, ...]:
    """Pieces of a text, no mask, and what follows each letter."""
    found = text[starts[:, None] + np.arange(length + 1)]
    return found[:, :-1], None, found[:, 1:]


def decoder(letters: str, **options: Any) -> Transformer:
    attention = partial(lln_attention, causal=True, heads=WIDTH // 16, **options)
    return Transformer(attention, nn.Embed(len(letters), WIDTH), len(letters), layers=3)


def train(model: nn.Module, text: np.ndarray, steps: int, seed: int) -> Any:
    """Variables after so many steps of 32 pieces."""
    rng = np.random.default_rng(seed)
    variables = jax.jit(model.init)(jax.random.key(seed), text[None, :LENGTH])
    params, kept = split(variables)
    optimizer = adam(steps, 2e-3)
    step, opt_state = make_step(model, optimizer), optimizer.init(params)
    for number in range(1, steps + 1):
        batch = cut(text, rng.integers(0, len(text) - LENGTH - 1, 32), LENGTH)
        params, kept, opt_state, loss = step(params, kept, opt_state, batch)
        if number % 100 == 0:
            print(f"step {number:5}  {loss:.3f} nats a letter", flush=True)
    return {"params": params, **kept}


def held_out(model: nn.Module, variables: Any, text: np.ndarray) -> float:
    """Nats for each letter of 512 pieces."""
    starts = np.linspace(0, len(text) - LENGTH - 1, 512).astype(int)

    @jax.jit
    def nats(variables: Any, batch: Any) -> jax.Array:
        logits: Any = model.apply(variables, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[2]).mean()

    return float(
        np.mean([nats(variables, cut(text, part, LENGTH)) for part in np.split(starts, 8)])
    )


def write(
    model: nn.Module,
    variables: Any,
    prompt: jax.Array,
    count: int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Letters ``[b, count]`` that follow ``prompt [b, n]``, and the logits they were drawn by."""
    empty = jax.jit(model.init)(jax.random.key(0), prompt[:, :1])["cache"]

    def read(cache: Any, x: jax.Array, start: Any) -> tuple[jax.Array, Any]:
        given = {**variables, "cache": cache}
        logits, state = model.apply(given, x, start=start, mutable=["cache"])
        return logits[:, -1], state["cache"]

    def one(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        logits, cache, at = carry
        letter = choose(key, logits)
        following, cache = read(cache, letter[:, None], at)
        return (following, cache, at + 1), (letter, logits)

    @jax.jit
    def run(cache: Any) -> Any:
        logits, filled = read(cache, prompt, 0)
        carry = logits, filled, prompt.shape[1]
        return jax.lax.scan(one, carry, jax.random.split(jax.random.key(1), count))[1]

    letters, logits = run(empty)
    return letters.T, jnp.swapaxes(logits, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="KING.\n")
    parser.add_argument("--letters", type=int, default=600, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()

    text, rest, letters = characters()
    whole = decoder(letters)
    variables = train(whole, text, args.steps, args.seed)
    print(f"plays left out: {held_out(whole, variables, rest):.3f} nats a letter")

    def choose(key: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(key, logits / args.temperature)

    prompt = jnp.array([[letters.index(letter) for letter in args.prompt]])
    recurrent = decoder(letters, decode=True)
    written, logits = write(recurrent, variables, prompt, args.letters, choose)
    print(args.prompt + "".join(letters[i] for i in written[0]))
    read = jax.jit(whole.apply)(variables, jnp.concatenate([prompt, written], 1))
    error = jnp.abs(read[:, prompt.shape[1] - 1 : -1] - logits).max()
    print(f"largest difference of logits from those of the whole sequence: {error:.1e}")


if __name__ == "__main__":
    main()
