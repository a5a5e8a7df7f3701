"""Bootstrap intervals for ratios of sums over examples.

Shapes: E examples, R resamples, C columns summed at once.
"""
import numpy as np

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
