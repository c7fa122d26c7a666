"""Photos that look alike: frames of one video, copies in another size or quality.

By the perceptual hashes of ``imagehash`` (an extra: ``pip install "crosskd-ifc[data]"``).
"""

import functools
from typing import List, Optional, Sequence

import numpy as np
from PIL import Image

MISSING = 'the package imagehash isn\'t installed (pip install "crosskd-ifc[data]")'
# Of 64 bits. Of 122 blood-cell photos, copies at half the size or JPEG quality 40 differ in at most
# 2, and no two photos in less than 14.
_CLOSE = 4


@functools.lru_cache(maxsize=None)
def is_available() -> bool:
    """Whether ``imagehash`` is installed."""
    try:
        import imagehash  # noqa: F401
    except ImportError:
        return False
    return True


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """64 bits as -1 and 1 that change little when an image is resized or saved again."""
    import imagehash

    bits = imagehash.phash(image.convert("L")).hash.reshape(-1)
    return np.where(bits, 1, -1).astype(np.float32)


def alike(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> np.ndarray:
    """Which photos look alike.

    Returns:
        Pairs of indices into the two, Nx2.
    """
    if not len(one) or not len(two):
        return np.zeros((0, 2), dtype=np.int64)
    other = np.stack(two)
    found = []
    for start in range(0, len(one), 1024):
        distance = (64 - np.stack(one[start : start + 1024]) @ other.T) / 2
        found.append(np.argwhere(distance <= _CLOSE) + (start, 0))
    return np.concatenate(found)


def groups_of_alike(hashes: Sequence[Optional[np.ndarray]]) -> List[List[int]]:
    """Indices in groups: photos that look alike, and those that look like one of them.

    Args:
        hashes: None for a photo that stands alone.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    known = [i for i, bits in enumerate(hashes) if bits is not None]
    some = [hashes[i] for i in known]
    pairs = np.array(known, dtype=np.int64)[alike(some, some)]  # type: ignore[arg-type]
    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(len(hashes),) * 2)
    count, labels = connected_components(graph, directed=False)
    groups: List[List[int]] = [[] for _ in range(count)]
    for i, label in enumerate(labels):
        groups[label].append(i)
    return groups
