"""Train a small neural network on scanned digits, on any number of processes: the first program to read.

    python examples/train_digits.py                        one process: collectives return what they were given
    rt.launch -n 4 examples/train_digits.py                four processes, one group
    rt.launch -n 4 examples/train_digits.py --compare      both ways to average gradients, timed

**Data-parallel training** in four lines: every rank holds the same weights; each step cuts the same batch in as many slices as there are
ranks; each rank computes the gradient on its slice; the ranks average their gradients and make the same step. The average over equal
slices is the gradient of the whole batch, so N ranks learn what one would, and the program checks just that at its end.

May live here: what a user would write. May not: anything of ``rt`` that is not public.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

import rt.sync

Array = npt.NDArray[np.float32]
Tree = dict[str, Array]  # weights or gradients by name; any nesting of dicts, lists and tuples would do

LEARNING_RATE = 0.05
MOMENTUM = 0.9
LEAST_ACCURACY = 0.95
LOSS_TOLERANCE = 1e-4  # relative; float32 sums taken in another order differ in their last bits


# --- the network: 64 pixels -> 64 hidden units -> 10 digits; nothing here knows of other ranks ---------------------------------------


@dataclass(frozen=True)
class Data:
    """Scans of 8 x 8 pixels as rows of 64 float32 in 0..1, and the digits they show."""

    images: Array
    labels: npt.NDArray[np.int64]

    def rows(self, rows: npt.NDArray[np.int64]) -> Data:
        return Data(self.images[rows], self.labels[rows])


def load() -> tuple[Data, Data]:
    """Return 80 % of the 1797 scans to train on and 20 % to test with; the same split for every rank and every run."""
    images, labels = load_digits(return_X_y=True)
    data = Data((images / 16).astype(np.float32), labels.astype(np.int64))
    order = np.random.default_rng(2024).permutation(len(labels))
    cut = len(labels) * 8 // 10
    return data.rows(order[:cut]), data.rows(order[cut:])


def initial_weights(seed: int) -> Tree:
    """Return random weights. All ranks use one seed, so they start equal and nothing has to be sent."""
    random = np.random.default_rng(seed)
    return {
        "w1": random.normal(0, np.sqrt(2 / 64), (64, 64)).astype(np.float32),
        "b1": np.zeros(64, np.float32),
        "w2": random.normal(0, np.sqrt(2 / 64), (64, 10)).astype(np.float32),
        "b2": np.zeros(10, np.float32),
    }


def forward(weights: Tree, images: Array) -> tuple[Array, Array]:
    """Return the hidden layer (n, 64) and the logarithms of the probabilities of the ten digits (n, 10)."""
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0)
    scores = hidden @ weights["w2"] + weights["b2"]
    scores -= scores.max(axis=1, keepdims=True)  # else exp() may overflow
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def loss_and_gradients(weights: Tree, batch: Data) -> tuple[float, Tree]:
    """Return the mean cross-entropy over the batch and its gradients by backpropagation."""
    hidden, log_probabilities = forward(weights, batch.images)
    rows = np.arange(len(batch.labels))
    error = np.exp(log_probabilities)
    error[rows, batch.labels] -= 1
    error /= len(rows)
    hidden_error = (error @ weights["w2"].T) * (hidden > 0)
    gradients = {
        "w1": batch.images.T @ hidden_error,
        "b1": hidden_error.sum(axis=0),
        "w2": hidden.T @ error,
        "b2": error.sum(axis=0),
    }
    return -float(log_probabilities[rows, batch.labels].mean()), gradients


def accuracy(weights: Tree, data: Data) -> float:
    """Return the share of scans whose digit is recognised."""
    return float((forward(weights, data.images)[1].argmax(axis=1) == data.labels).mean())


def batches(data: Data, batch_size: int, epochs: int, seed: int) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Yield for every epoch its batches, as row numbers. Seeded, so all ranks (and any number of ranks) shuffle alike."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(data.labels))
        yield [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]


# --- training: the only part that communicates, and only through ``average`` ---------------------------------------------------------


class Averager:
    """Averages over the ranks, counting bytes and seconds. The seconds include waiting for ranks that are not there yet."""

    def __init__(self, how: str) -> None:
        self._how = how
        self.nbytes = 0
        self.seconds = 0.0

    def __call__(self, tree: Tree) -> Tree:
        start = time.perf_counter()
        if self._how == "average":  # many small arrays in few messages
            averaged: Tree = rt.sync.average_gradients(tree)
        else:  # "leaf": one message per array
            averaged = {name: rt.sync.all_reduce(leaf, op="mean") for name, leaf in tree.items()}
        self.seconds += time.perf_counter() - start
        self.nbytes += sum(leaf.nbytes for leaf in tree.values())
        return averaged


@dataclass
class Result:
    """What a training came to: the weights, the mean loss of each epoch, and the seconds it took."""

    weights: Tree
    losses: list[float]
    seconds: float


def train(
    data: Data, options: argparse.Namespace, rank: int, size: int, average: Callable[[Tree], Tree], show: Callable[[int, float, Tree], None]
) -> Result:
    """Train by gradient descent with momentum; ``average`` makes one gradient of those of all ranks."""
    start = time.perf_counter()
    weights = initial_weights(options.seed)
    velocity = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    losses = []
    for epoch, rows_of_batches in enumerate(batches(data, options.batch_size, options.epochs, options.seed), 1):
        epoch_loss = 0.0
        for rows in rows_of_batches:
            mine = rows.reshape(size, -1)[rank]  # this rank's slice of the batch
            loss, gradients = loss_and_gradients(weights, data.rows(mine))
            gradients = average(gradients)
            for name, leaf in weights.items():
                velocity[name] = MOMENTUM * velocity[name] - LEARNING_RATE * gradients[name]
                leaf += velocity[name]
            epoch_loss += loss / len(rows_of_batches)
        losses.append(float(average({"loss": np.array([epoch_loss], np.float32)})["loss"][0]))
        show(epoch, losses[-1], weights)
    return Result(weights, losses, time.perf_counter() - start)


# --- checking ------------------------------------------------------------------------------------------------------------------------


def digest(weights: Tree) -> bytes:
    """Return 32 bytes that are others if any bit of the weights is."""
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in weights.values())).digest()


def same_everywhere(weights: Tree) -> bool:
    """Say whether all ranks hold the same weights to the last bit: gather a digest of each rank's, and compare."""
    digests = rt.sync.all_gather(np.frombuffer(digest(weights), np.uint8).copy()).reshape(-1, 32)
    return bool((digests == digests[0]).all())


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference between two curves."""
    return float(np.max(np.abs(np.subtract(losses, expected)) / np.abs(expected)))


# --- the program ---------------------------------------------------------------------------------------------------------------------


def parse(size: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network on scanned digits, on any number of ranks.")
    parser.add_argument("--gradients", choices=("leaf", "average"), default="average", help="one all-reduce per array, or fused (default)")
    parser.add_argument("--compare", action="store_true", help="train both ways and show both timings")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="rows per step, over all ranks together (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs: found {options.epochs}, expected at least 1")
    if options.batch_size < 1 or options.batch_size % size:
        parser.error(f"--batch-size: found {options.batch_size}, expected a multiple of the {size} ranks: each takes an equal slice")
    return options


def progress(epochs: int, test: Data) -> Callable[[int, float, Tree], None]:
    """Return what shows an epoch: one line that renews itself on a terminal, a line per epoch in a pipe or file."""
    live = sys.stdout.isatty()

    def show(epoch: int, loss: float, weights: Tree) -> None:
        line = f"epoch {epoch:3d}/{epochs}   loss {loss:.4f}   accuracy {accuracy(weights, test):.1%}"
        print(f"\r{line}" if live else line, end="" if live and epoch < epochs else "\n", flush=True)

    return show


def silent(epoch: int, loss: float, weights: Tree) -> None:
    """Show nothing: for every rank but 0, which speaks for all."""


def main() -> int:
    group = rt.sync.init()
    rank, size = group.rank(), group.size()
    options = parse(size)
    training, test = load()
    show = progress(options.epochs, test) if rank == 0 else silent

    runs = []
    for how in ("leaf", "average") if options.compare else (options.gradients,):
        if rank == 0:
            print(f"gradients by {how!r}", flush=True)
        average = Averager(how)
        result = train(training, options, rank, size, average, show)
        runs.append((how, average, result, same_everywhere(result.weights)))
    if rank != 0:
        return 0 if all(same for *_, same in runs) else 1

    # One rank is enough to find out what a single process would have learnt from the same batches.
    alone = train(training, options, 0, 1, lambda gradients: gradients, silent)
    print(f"\n{size} rank{'s' if size > 1 else ''}, {options.epochs} epochs of {len(training.labels) // options.batch_size} steps")
    return 0 if all([report(how, average, result, same, alone, test) for how, average, result, same in runs]) else 1


def report(how: str, average: Averager, result: Result, same: bool, alone: Result, test: Data) -> bool:
    """Print what came out of one training; return whether all that was promised holds."""
    score = accuracy(result.weights, test)
    difference = largest_difference(result.losses, alone.losses)
    checks = {
        f"test accuracy {score:.1%} (at least {LEAST_ACCURACY:.0%})": score >= LEAST_ACCURACY,
        f"weights bit-identical on all ranks (sha256 {digest(result.weights).hex()[:16]})": same,
        f"losses equal to one process within {difference:.0e} (at most {LOSS_TOLERANCE:.0e})": difference <= LOSS_TOLERANCE,
    }
    cost = f"{average.nbytes / 1e6:.1f} MB reduced per rank; {average.seconds:.2f} s of {result.seconds:.2f} s in communication"
    print(f"  gradients by {how!r}: {cost}")
    for text, holds in checks.items():
        print(f"    {'ok    ' if holds else 'FAILED'} {text}")
    return all(checks.values())


if __name__ == "__main__":
    sys.exit(main())
