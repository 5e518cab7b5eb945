"""The linear probe against scikit-learn's logistic regression: processor seconds until the held-out accuracy is right.

    python benchmarks/probe_speed.py [--images 20000] [--width 384] [--classes 200] [--strength 0.1] [--choice]
        [--threads N]

It makes random features whose classes overlap and whose variance falls over two orders of magnitude, and prints a
Markdown table. What is right is the accuracy of scikit-learn's fit with a tolerance of 1e-8, on 5,000 features that no
fit sees. Either side is run with more and more iterations; its first row within 0.3 points is the first after which all
are. --choice: instead, the probe as `evaluate` runs it, with a choice of the penalty among three, and the same fits by
scikit-learn.

--threads: ours has so many, and scikit-learn one, with which it was fastest on two cores (with two it took 64 s where
one took 49); seconds are then those of the clock, for an idle machine.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.config import load_config
from pipeline.evaluation.classification import accuracy, linear_scores
from singer.logistic import LogisticProblem

_TEST = 5000
_TOLERANCE = 1e-8
_CLOSE = 0.3
_ITERATIONS = (3, 5, 7, 10, 15, 20, 30, 45, 65, 100, 150)

# Iterations (of ours: passes), and the accuracy (%).
Outcome = tuple[int, float]


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--choice", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    clock = time.process_time
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        threadpool_limits(1, "blas")
        clock = time.perf_counter
    warnings.simplefilter("ignore", ConvergenceWarning)
    x, labels = features(options.images + _TEST, options.width, options.classes)
    a, y, b, truth = x[:-_TEST], labels[:-_TEST], x[-_TEST:], labels[-_TEST:]

    def ours(most: int = 300) -> Outcome:
        fitted = LogisticProblem(a, y, options.classes).fit(options.strength, max_passes=most)
        return fitted.passes, accuracy([fitted.scores(b)], truth)["top1"]

    def theirs(most: int = 1000, tolerance: float = _TOLERANCE, strength: float = options.strength) -> Outcome:
        fitted = LogisticRegression(C=strength, max_iter=most, tol=tolerance).fit(a.numpy(), y.numpy())
        return int(fitted.n_iter_[0]), 100 * float(fitted.score(b.numpy(), truth.numpy()))

    print(f"{options.images} x {options.width}, {options.classes} classes, C = {options.strength}")
    timed = "clock" if options.threads else "processor time"
    print(f"{torch.get_num_threads()} threads; {timed}\n\n| | iterations | seconds | accuracy, % |\n|---|---|---|---|")
    if options.choice:
        settings = load_config().evaluate

        def choice() -> Outcome:
            return 0, accuracy(linear_scores(a, y, b, options.classes, settings), truth)["top1"]

        def plain(tolerance: float) -> Outcome:
            fit, rest = slice(0, options.images * 4 // 5), slice(options.images * 4 // 5, None)
            scores = {}
            for c in settings.strengths:
                fitted = LogisticRegression(C=c, max_iter=1000, tol=tolerance).fit(a[fit].numpy(), y[fit].numpy())
                scores[c] = fitted.score(a[rest].numpy(), y[rest].numpy())
            return theirs(tolerance=tolerance, strength=max(scores, key=lambda c: scores[c]))

        fast = row(clock, "singer, choice among three", choice)[0]
        for tolerance in (1e-4, _TOLERANCE):
            slow = row(clock, f"scikit-learn, choice among three, tolerance {tolerance:g}", partial(plain, tolerance))[
                0
            ]
            print(f"\n{slow / fast:.1f} times as fast\n", flush=True)
        return
    right = row(clock, f"scikit-learn, tolerance {_TOLERANCE:g}", theirs)[1][1]
    row(clock, "scikit-learn, default tolerance", lambda: theirs(tolerance=1e-4))
    slow = first_close(clock, "scikit-learn", theirs, right)
    row(clock, "singer, until it has converged", ours)
    fast = first_close(clock, "singer", ours, right)
    print(f"\nWithin {_CLOSE} points: {slow / fast:.1f} times as fast", flush=True)


def row(clock: Callable[[], float], name: str, fit: Callable[[], Outcome]) -> tuple[float, Outcome]:
    """Print a row of the table; return its seconds and the outcome."""
    start = clock()
    found = fit()
    seconds = clock() - start
    print(f"| {name} | {found[0] or ''} | {seconds:.2f} | {found[1]:.2f} |", flush=True)
    return seconds, found


def first_close(clock: Callable[[], float], name: str, fit: Callable[[int], Outcome], right: float) -> float:
    """Print the rows of more and more iterations, until two in turn change nothing; return the seconds of the first.

    The first is the first close one after which all are close.
    """
    first: float | None = None
    before: Outcome | None = None
    for most in _ITERATIONS:
        seconds, found = row(clock, f"{name}, at most {most}", partial(fit, most))
        close = abs(found[1] - right) <= _CLOSE
        first = (first or seconds) if close else None
        if found[0] < most or (close and before is not None and abs(before[1] - found[1]) <= _CLOSE / 3):
            break
        before = found
    return first or float("nan")


def features(count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return standardised features (count, width) around class centres, of correlated channels, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    mix = torch.logspace(0, -2, width)[:, None] * torch.randn(width, width, generator=generator)
    x = (centres[labels] + 3 * torch.randn(count, width, generator=generator)) @ mix
    return (x - x.mean(0)) / x.std(0), labels


if __name__ == "__main__":
    main()
