"""Draws the pictures of the built-in data set, one at a time, from numbers alone.

Textured, rotated, overlapping shapes on cluttered backgrounds. It is hard on purpose: two classes
differ only in texture, two only in their number of points, some painted shapes belong to no class,
and objects hide each other.

Shape shorthand and format:
    H, W: height and width of an image in pixels, both ``image_size``
    R: number of objects in an image, at most 7
    x, y: pixel coordinates, x to the right; the centre of the first pixel is (0.5, 0.5)
    Images are uint8 RGB. Annotations are COCO dicts: ``bbox`` is (x, y, width, height) in absolute
    pixels, tight around the visible part; ``segmentation`` is a list of polygons of that part.
"""

from typing import Dict, List, Optional, Tuple

import cv2
import numpy as np

CLASSES = ("striped_disk", "dotted_disk", "ring", "crescent", "triangle", "cross", "star5", "star6")
SPLIT_IDS = {"train": 0, "val": 1, "test": 2}

# Colour is a hint at the kind of shape, but not within the two pairs that are hard to tell apart.
_HUES = dict(zip(CLASSES, (0.1, 0.1, 2.1, 3.9, 3.1, 5.1, 1.0, 1.0)))
_DISTRACTORS = ("plain_disk", "ellipse", "square", "star4", "half_disk")
_PATTERNS = ("stripes", "dots", "checker", "speckle")
_TEXTURES = ("plain",) * 3 + _PATTERNS
_MIN_VISIBLE = 0.55  # the fraction of an object that later ones leave visible
_MIN_PIECE = 12  # square pixels; smaller visible pieces count as hidden


def _color(rng, saturation, value, hue=None) -> np.ndarray:
    """Returns an RGB colour in [0, 1], shape (3,); ``hue`` in [0, 6), by default a random one."""
    h, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    h = h if hue is None else hue
    return v * (1 - s + s * np.clip(np.abs((h + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1))


def _mix(a, b, t) -> np.ndarray:
    """Goes from ``a`` to ``b``, colours (3,) or pictures (H, W, 3), by ``t`` (H, W)."""
    out = (b - a) * t[..., None]
    out += a
    return out


def _value_noise(rng, n, cells) -> np.ndarray:
    """Smooth noise in [0, 1] of shape (n, n): a random grid, interpolated."""
    grid = rng.random((cells + 2, cells + 2))
    t = np.linspace(0, cells, n, endpoint=False)
    i, f = t.astype(int), t - t.astype(int)
    f = f * f * (3 - 2 * f)
    rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


def _distance(kind, rng, u, v) -> np.ndarray:
    """Signed distance to the outline (inside is positive) in a frame where the radius is 1."""
    rho = np.hypot(u, v)
    if kind in ("striped_disk", "dotted_disk", "plain_disk"):
        return 1 - rho
    if kind == "ring":
        return np.minimum(1 - rho, rho - rng.uniform(0.45, 0.65))
    if kind == "crescent":
        return np.minimum(1 - rho, np.hypot(u - rng.uniform(0.4, 0.6), v) - rng.uniform(0.7, 0.85))
    if kind == "cross":
        a, b, w = np.abs(u), np.abs(v), rng.uniform(0.26, 0.38)
        return np.maximum(np.minimum(w - a, 0.95 - b), np.minimum(0.95 - a, w - b))
    if kind in ("star4", "star5", "star6"):
        n = int(kind[-1])
        inner = rng.uniform(0.42, 0.52)
        # Fold the plane into one half point of the star: its outline is a single straight edge.
        angle = np.abs((np.arctan2(v, u) + np.pi / n) % (2 * np.pi / n) - np.pi / n)
        ex, ey = inner * np.cos(np.pi / n) - 1, inner * np.sin(np.pi / n)
        a, b = rho * np.cos(angle) - 1, rho * np.sin(angle)
        return (ex * b - ey * a) / np.hypot(ex, ey)
    if kind == "ellipse":
        return (1 - np.hypot(u, v / rng.uniform(0.35, 0.5))) * 0.5
    if kind == "half_disk":
        return np.minimum(1 - rho, u + rng.uniform(0.0, 0.2))
    if kind == "square":
        return 0.75 - np.maximum(np.abs(u), np.abs(v))
    assert kind == "triangle", kind
    return np.min([0.5 - u * np.cos(t) - v * np.sin(t) for t in np.pi * np.array([1, 3, 5]) / 3], 0)


def _texture(kind, rng, u, v, period) -> np.ndarray:
    """Mixing weight of the second colour in [0, 1]; ``u``, ``v`` and ``period`` in pixels."""
    u, v = u + rng.uniform(0, period), v + rng.uniform(0, period)
    if kind == "stripes":
        return np.clip(0.5 + 0.35 * period * np.sin(2 * np.pi * u / period), 0, 1)
    if kind == "dots":
        a, b = u % period - period / 2, v % period - period / 2
        return np.clip(0.5 + 0.33 * period - np.hypot(a, b), 0, 1)
    if kind == "checker":
        wave = np.sin(np.pi * u / period) * np.sin(np.pi * v / period)
        return np.clip(0.5 + 0.5 * period * wave, 0, 1)
    if kind == "speckle":
        return rng.random(u.shape) ** 2
    return np.zeros(u.shape)


def _background(rng, x, y) -> np.ndarray:
    """Returns a canvas of shape (H, W, 3) in [0, 1]."""
    n = len(x)
    a = _color(rng, (0.0, 0.3), (0.25, 0.85))
    b = np.clip(a + rng.uniform(-0.12, 0.12, 3), 0.05, 0.95)
    phi = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + ((x / n - 0.5) * np.cos(phi) + (y / n - 0.5) * np.sin(phi)) * 0.7
    cloud = 0.65 * _value_noise(rng, n, rng.integers(3, 7)) + 0.35 * _value_noise(rng, n, 16)
    canvas = _mix(a, b, np.clip(ramp + rng.uniform(0.3, 1.2) * (cloud - 0.5), 0, 1))
    if rng.random() < 0.5:  # a faint pattern, so that texture alone doesn't mean an object
        u = x * np.cos(phi) + y * np.sin(phi)
        v = y * np.cos(phi) - x * np.sin(phi)
        kind = _PATTERNS[rng.integers(len(_PATTERNS))]
        t = _texture(kind, rng, u, v, rng.uniform(0.05, 0.12) * n)
        canvas = _mix(canvas, _color(rng, (0, 0.5), (0.1, 1)), t * rng.uniform(0.05, 0.25))
    for _ in range(rng.integers(1, 6)):  # strokes: arcs of large circles
        radius, width = rng.uniform(0.15, 1.2) * n, rng.uniform(0.004, 0.016) * n
        cx, cy = rng.uniform(-0.4, 1.4, 2) * n
        line = np.clip(width + 0.5 - np.abs(np.hypot(x - cx, y - cy) - radius), 0, 1)
        color, alpha, where = _color(rng, (0, 0.6), (0.2, 1)), rng.uniform(0.3, 0.8), line > 0
        canvas[where] = _mix(canvas[where], color, line[where] * alpha)
    return canvas


def _paint(canvas, kind, rng, d, u, v, radius, image_size) -> None:
    """Paints one shape into ``canvas`` (H, W, 3); ``d``, ``u``, ``v`` (H, W) in pixels."""
    texture = {"striped_disk": "stripes", "dotted_disk": "dots", "plain_disk": "plain"}.get(kind)
    texture = texture or _TEXTURES[rng.integers(len(_TEXTURES))]
    period = max(rng.uniform(0.36, 0.56) * radius, 0.04 * image_size)
    hue = _HUES[kind] + rng.normal(0, 0.2) if kind in _HUES else None
    first = _color(rng, (0.55, 1), (0.55, 1), hue)
    second = first + (rng.integers(2) - first) * rng.uniform(0.45, 0.8)  # lighter or darker
    fill = _mix(first, second, _texture(texture, rng, u, v, period))
    light = rng.uniform(-0.2, 0.2, 2) / radius
    fill = fill * (1 + light[0] * u + light[1] * v)[..., None]
    if rng.random() < 0.5:  # an outline, lighter or darker than the inside
        edge = np.clip(rng.uniform(1.0, 2.2) + 0.5 - d, 0, 1)
        fill = _mix(fill, first * rng.uniform(0.3, 0.6) + rng.uniform(0, 0.4), edge)
    shadow = np.exp(np.minimum(d, 0) / (0.025 * image_size))
    canvas *= (1 - rng.uniform(0.15, 0.5) * shadow)[..., None]
    canvas[:] = _mix(canvas, fill, np.clip(d + 0.5, 0, 1))


def _camera(canvas, rng, x, y) -> np.ndarray:
    """Light from one side, vignette, contrast, colour cast, blur and noise; returns uint8."""
    n = len(x)
    phi, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5)
    a, b = x / n - 0.5, y / n - 0.5
    light = 1 + strength * (a * np.cos(phi) + b * np.sin(phi))
    light = light - rng.uniform(0, 0.5) * (a * a + b * b)
    canvas *= light[..., None] * rng.uniform(0.93, 1.07, 3)
    contrast, brightness = rng.uniform(0.75, 1.15), rng.uniform(-0.08, 0.08)
    canvas *= contrast
    canvas += 0.5 * (1 - contrast) + brightness
    np.clip(canvas, 0, 1, out=canvas)
    if rng.random() < 0.35:
        p, side = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), "edge"), rng.uniform(0.1, 0.3)
        p = p[:-2] * side + p[1:-1] * (1 - 2 * side) + p[2:] * side
        canvas = p[:, :-2] * side + p[:, 1:-1] * (1 - 2 * side) + p[:, 2:] * side
    canvas += rng.normal(0, rng.uniform(0.005, 0.03), canvas.shape)
    canvas *= 255
    return np.clip(np.rint(canvas, out=canvas), 0, 255, out=canvas).astype(np.uint8)


def _polygons(mask) -> List[np.ndarray]:
    """Outlines, each (P, 2), of a bool mask. Where it has a hole, it is cut: COCO has none."""
    s = 4  # on an enlarged, smoothed mask, pixel centres lie close to the true outline
    large = cv2.resize(np.pad(mask, 1).astype(np.float32), None, fx=s, fy=s)
    large = (large > 0.5).astype(np.uint8)
    contours, tree = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour, links in zip(contours, [] if tree is None else tree[0]):
        if links[3] >= 0:  # a hole
            left, right = contour[:, 0, 0].min(), contour[:, 0, 0].max()
            half = np.arange(mask.shape[1]) < (left + right) // 2 // s - 1
            return _polygons(mask & half) + _polygons(mask & ~half)
    contours = [c for c in contours if cv2.contourArea(c) >= _MIN_PIECE * s * s]
    return [(cv2.approxPolyDP(c, 0.35 * s, True)[:, 0] + 0.5) / s - 1 for c in contours]


def _annotation(kind, mask) -> Optional[dict]:
    """The COCO annotation, without ids, of a visible bool mask (H, W); None if it is crumbs."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    polygons = [p + (x, y) for p in _polygons(mask[y : y + h, x : x + w])]
    if not polygons:
        return None
    low, high = np.min([p.min(0) for p in polygons], 0), np.max([p.max(0) for p in polygons], 0)
    return {
        "category_id": CLASSES.index(kind) + 1,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(sum(cv2.contourArea(p.astype(np.float32)) for p in polygons)),
        "iscrowd": 0,
        "segmentation": [p.ravel().tolist() for p in polygons],
    }


def render(
    seed: int, split: str, index: int, image_size: int = 128
) -> Tuple[np.ndarray, List[Dict[str, object]]]:
    """Draws one image. The result depends on the arguments only, not on what was drawn before.

    Returns:
        the image, uint8 RGB of shape (H, W, 3), and R annotations as COCO dicts without ids.
    """
    rng = np.random.default_rng([seed, SPLIT_IDS[split], index])
    y, x = np.mgrid[:image_size, :image_size] + 0.5
    canvas = _background(rng, x, y)
    kinds = [CLASSES[i] for i in rng.integers(len(CLASSES), size=rng.integers(3, 8))]
    kinds += [_DISTRACTORS[i] for i in rng.integers(len(_DISTRACTORS), size=rng.integers(0, 3))]
    drawn = ["background"]
    owner = np.zeros(x.shape, int)  # index into drawn of what each pixel shows
    full = visible = np.zeros(1, int)  # pixels of each of drawn: when painted, and by now
    for kind in (kinds[i] for i in rng.permutation(len(kinds))):
        for _ in range(25):  # if no place is found, the image has one shape less
            radius = rng.uniform(0.11, 0.25) * image_size
            cx, cy = rng.uniform(0.75 * radius, image_size - 0.75 * radius, 2)
            phi, squash = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1)
            reach = 1.07 * radius + 0.1 * image_size  # the shape and its shadow lie within
            window = tuple(slice(max(int(c - reach), 0), int(c + reach) + 1) for c in (cy, cx))
            dx, dy = x[window] - cx, y[window] - cy
            u = dx * np.cos(phi) + dy * np.sin(phi)
            v = (dy * np.cos(phi) - dx * np.sin(phi)) / squash
            d = _distance(kind, rng, u / radius, v / radius)
            d = np.minimum(d, 1.07 - np.hypot(u, v) / radius) * radius
            mask = d > 0
            hidden = np.bincount(owner[window][mask], minlength=len(drawn))
            if (visible - hidden >= _MIN_VISIBLE * full)[1:].all():
                _paint(canvas[window], kind, rng, d, u, v, radius, image_size)
                owner[window][mask] = len(drawn)
                drawn.append(kind)
                full = np.append(full, mask.sum())
                visible = np.append(visible - hidden, mask.sum())
                break
    image = _camera(canvas, rng, x, y)
    objects = [_annotation(k, owner == i) for i, k in enumerate(drawn) if k in CLASSES]
    return image, [annotation for annotation in objects if annotation]
