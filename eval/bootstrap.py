"""Bootstrap intervals for ratios of sums over examples, and the flags of the commands that give them.

Shapes: E examples, R resamples, C columns summed at once.
"""
import argparse

import numpy as np

from eval.common import check_values

DRAWS = 2**22   # examples drawn at once: 32 MB a copy, and a few copies


def resampled_sums(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """columns: (E, C) -> (R, C): sums over E rows drawn with replacement, the same rows for all columns, so
    that columns of one call can be divided and subtracted as pairs. A column's sums do not depend on the
    other columns, to the last bit."""
    # A product with all columns at once would round by how many they are.
    columns = np.ascontiguousarray(np.transpose(columns), np.float64)   # (C, E)
    count, examples = columns.shape
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, count))
    chunk = max(1, DRAWS // examples)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(examples, size=(min(chunk, resamples - start), examples))
        drawn += np.arange(len(drawn))[:, None] * examples      # a range of numbers for each resample
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        for c, column in enumerate(columns):
            sums[start:start + len(drawn), c] = times @ column
    return sums


def interval(values: np.ndarray, confidence: float) -> list[float]:
    """values: (R,) -> [low, high]: as many below as above, and the part `confidence` of them between."""
    return np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()


def add_bootstrap_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples for the intervals; 0: none")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")


def check_flags(args: argparse.Namespace, files: tuple[str, ...], **least: int) -> None:
    """common.check_values for these flags too."""
    check_values(args, files, bootstrap=0, seed=0, **least)
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence {args.confidence}: must be above 0 and below 1")
