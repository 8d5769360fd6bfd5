"""Keyed hashes and permutations: randomness as a function of (seed, index), so that nothing has to be stored to resume.

The hash is splitmix64 (Steele, Lea, Flood 2014), which passes BigCrush as a counter-based generator. The permutation is a
Feistel network (Luby and Rackoff 1988) with cycle walking: position i of 10^9 documents is known without the ones before it.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: uint64 -> uint64, every output bit depends on every input bit."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)  # in place: a third of the time goes to temporaries
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_keys(*parts: int | np.ndarray) -> np.ndarray:
    """64-bit keys from several integers (or arrays of them, broadcast); their order matters. Shape (1,) for integers."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(int(part) % 2**64)
        key = mix(key * GOLDEN + number + GOLDEN)
    return key


def hash_key(*parts: int) -> int:
    """The 64-bit key of several integers."""
    return int(hash_keys(*parts)[0])


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """The keyed permutation of range(size), at `indices`. int64 -> int64."""
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = hash_keys(key, np.arange(4))
    out = indices.astype(np.uint64)
    walking = np.ones(len(out), dtype=bool)
    while walking.any():  # the network permutes a power of four; walk until back inside `size`
        left, right = out[walking] >> np.uint64(half), out[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        out[walking] = (left << np.uint64(half)) | right
        walking &= out >= size
    return out.astype(np.int64)


def draw_share(size: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the other rows, of the `share` of rows that `seed` draws to be held out), each sorted."""
    order, cut = permute(np.arange(size), size, hash_key(seed, 0x5411)), max(1, round(size * share))
    return np.sort(order[cut:]), np.sort(order[:cut])


def choose_sources(indices: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """The source number of every row index, in proportion to `weights`.

    It is the one in whose share of the unit interval `frac(offset + index * golden ratio)` falls (Weyl's sequence: any run of n
    rows is within about log(n) / n of the weights, also every 2nd or 8th row, which is what a data rank sees).
    """
    points = indices.astype(np.uint64) * GOLDEN + hash_keys(seed, 0x313)
    ends = np.cumsum(weights) / np.sum(weights)
    last = int(np.flatnonzero(weights)[-1])
    return np.minimum(np.searchsorted(ends, points / 2.0**64, side="right"), last)
