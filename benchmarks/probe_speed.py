"""The linear probe against scikit-learn's logistic regression: time, loss and accuracy at one penalty.

    python benchmarks/probe_speed.py [--images 100000] [--width 384] [--classes 1000] [--strength 1] [--iterations 20]

It makes random features of correlated channels, and prints a Markdown table. scikit-learn stops after --iterations; its
default tolerance is on the largest entry of the gradient, which with many classes is small from the start.
"""

import argparse
import time
import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from singer.logistic import LogisticProblem

_TEST = 5000


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    x, labels = features(options.images + _TEST, options.width, options.classes)
    train, test = slice(0, options.images), slice(options.images, None)
    print(f"{options.images} x {options.width}, {options.classes} classes, {torch.get_num_threads()} threads\n")
    print("| | seconds | processor seconds | passes | loss | accuracy, % |\n|---|---|---|---|---|---|")

    def row(name: str, start: tuple[float, float], passes: int, weight: Tensor, bias: Tensor) -> None:
        wall, busy = time.perf_counter() - start[0], time.process_time() - start[1]
        loss = weight.square().sum() / (2 * options.strength)
        for part, own in zip(x[train].split(8192), labels[train].split(8192), strict=True):
            loss += torch.nn.functional.cross_entropy(part @ weight.T + bias, own, reduction="sum")
        right = ((x[test] @ weight.T + bias).argmax(1) == labels[test]).float().mean()
        print(
            f"| {name} | {wall:.1f} | {busy:.1f} | {passes} | {float(loss):.1f} | {100 * float(right):.2f} |",
            flush=True,
        )

    start = time.perf_counter(), time.process_time()
    fitted = LogisticProblem(x[train], labels[train], options.classes).fit(options.strength)
    row("singer", start, fitted.passes, fitted.weight, fitted.bias)
    start = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        plain = LogisticRegression(C=options.strength, max_iter=options.iterations, tol=1e-9)
        plain.fit(x[train].numpy(), labels[train].numpy())
    weight, bias = (torch.from_numpy(w).float() for w in (plain.coef_, plain.intercept_))
    row("scikit-learn, stopped", start, int(plain.n_iter_[0]), weight, bias)


def features(count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return standardised features (count, width) around class centres, with correlated channels, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    x = (centres[labels] + 2.5 * torch.randn(count, width, generator=generator)) @ mix
    return (x - x.mean(0)) / x.std(0), labels


if __name__ == "__main__":
    main()
