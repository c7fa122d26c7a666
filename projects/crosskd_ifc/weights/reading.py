"""Files of weights, read without running code from them: torch's, safetensors, and the pickles of
detectron2's model zoo."""

import collections
import errno
import io
import os
import pickle
import sys
import zipfile
from typing import Any, BinaryIO, Dict, Iterator, Mapping, Tuple

import numpy as np
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from ..common.errors import one_line


class WeightsError(ValueError):
    """A file of weights can't be read, or must not be."""


class _Refused(pickle.UnpicklingError):
    pass


class _DType:
    """Stands in for ``numpy.dtype`` in a pickle, whose state could make numpy read any memory."""

    def __init__(self, code: Any, *_):
        self._code = str(code)

    def __setstate__(self, state):
        _, order, *fields = state
        if fields[:3] != [None] * 3:
            raise _Refused("numpy.dtype with fields")
        if order not in ("|", "=", "<" if sys.byteorder == "little" else ">"):
            raise _Refused(f"numpy.dtype {order}{self._code} of another byte order")

    def array(self, data: Any, shape: Any, order: str) -> np.ndarray:
        if self._code not in _PLAIN_DTYPES:
            raise _Refused(f"numpy.dtype {self._code}")
        # Python 2 wrote bytes as text.
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, self._code).reshape(shape, order=order)


class _Array(np.ndarray):
    """What an array is unpickled to: only from data that fill plain numbers exactly."""

    def __setstate__(self, state):
        *_, shape, dtype, is_fortran, data = state
        plain = _as_dtype(dtype).array(data, shape, "F" if is_fortran else "C")
        super().__setstate__((1, plain.shape, plain.dtype, bool(is_fortran), plain.tobytes("A")))


def _as_dtype(x: Any) -> _DType:
    if not isinstance(x, _DType):
        raise _Refused(f"numpy.dtype {x!r}")
    return x


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"text in {encoding}")
    return text.encode(encoding)


_PLAIN_DTYPES = {"b1", "f2", "f4", "f8", *(f"{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8))}
# All that a pickled dict of numpy arrays is made of, and what it is unpickled with.
_ADMITTED = {
    ("_codecs", "encode"): _encode,  # bytes in pickles of protocol 2
    ("__builtin__", "bytes"): lambda: b"",  # of empty arrays there
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array((0,))
    _ADMITTED[f"{_core}.multiarray", "scalar"] = lambda dtype, data: (
        _as_dtype(dtype).array(data, (1,), "C")[0]
    )
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = lambda data, dtype, shape, order: (
        _as_dtype(dtype).array(data, shape, order)
    )


_WRITTEN_AS_THEY_ARE = (type(None), bool, int, float, str, bytes, torch.Tensor, nn.Parameter)


# The one written in C reserves memory for as many entries as a number in the file asks for.
class _NumpyUnpickler(pickle._Unpickler):
    """Admits arrays of plain numbers and plain containers; looking up anything else is where code
    would start to run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _Refused(f"{module}.{name}")
        return _ADMITTED[module, name]


def load_weights(path: str) -> Any:
    """The content of a file of weights, on the CPU.

    Args:
        path: a path or URL. ``.pkl``: a pickle of numpy arrays, as in detectron2's model zoo;
            ``.safetensors``: gives ``{"model": tensors}``; all others: written by ``torch.save``.

    Raises:
        FileNotFoundError: if it doesn't exist.
        WeightsError: if it can't be read, or not without running code from it, if it holds no
            mapping, or if its weights hold a NaN or an infinite number.
    """
    local = PathManager.get_local_path(path)
    if os.path.isdir(local):
        raise FileNotFoundError(f"{path}: a folder; name a file in it, such as model_final.pth")
    if not os.path.isfile(local):
        raise FileNotFoundError(f"{path}: no such file")
    content = _read(local, path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: there are no weights in it")
    for name, tensor in _tensors(content):
        if kind := _odd_kind(tensor):
            raise WeightsError(f"{path}: {name} is {kind} tensor, not one of plain numbers")
    weights = content
    for key in ("model", "model_state", "blobs", "state_dict"):  # detectron2, pycls, Caffe2, mmdet
        if key in content:
            weights = content[key]
            break
    items = weights.items() if isinstance(weights, Mapping) else ()
    broken = [k for k, v in items if not _is_finite(v)]
    if broken:
        names = ", ".join(map(str, broken[:3])) + (", ..." if len(broken) > 3 else "")
        raise WeightsError(
            f"{path}: {len(broken)} of its tensors hold NaN or infinity: {names}; the training "
            "that wrote it had diverged, or the file is damaged"
        )
    return content


def _tensors(content: Any) -> Iterator[Tuple[Any, torch.Tensor]]:
    """Every tensor in nested containers, with the key that it or its list has."""
    seen, todo = set(), [("", content)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            is_mapping = isinstance(value, Mapping)
            todo += value.items() if is_mapping else ((name, item) for item in value)


def unreadable(content: Any, name: str = "") -> str:
    """What :func:`load_weights` would refuse in a state that ``torch.save`` writes, or ""."""
    if type(content) in (dict, collections.OrderedDict, list, tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        pairs = ((x, f"{name}.{key}".lstrip(".")) for key, value in items for x in (key, value))
        return next(filter(None, (unreadable(*pair) for pair in pairs)), "")
    if isinstance(content, torch.Tensor) and (kind := _odd_kind(content)):
        return f"{name} is {kind} tensor"
    if type(content) not in _WRITTEN_AS_THEY_ARE:
        file = io.BytesIO()
        try:
            torch.save(content, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception:  # of anyone's classes
            return f"{name} is of type {type(content).__module__}.{type(content).__qualname__}"
    return ""


def _odd_kind(x: torch.Tensor) -> str:
    """What makes a tensor more than numbers in memory, or ""."""
    if x.layout != torch.strided:
        return "a sparse"
    if x.is_meta:
        return "a meta"
    if x.is_quantized:
        return "a quantized"
    # Numbers that are there once and stand for many could ask for any amount of memory.
    is_larger = x.numel() * x.element_size() > x.untyped_storage().nbytes()
    return "an expanded" if is_larger else ""


def _is_finite(value: Any) -> bool:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return bool(np.isfinite(value).all())
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(value.isfinite().all())
    return True


def _read(local: str, path: str) -> Any:
    reader = {".pkl": "pickle", ".safetensors": "safetensors"}.get(
        os.path.splitext(local)[1], "torch"
    )
    try:
        with open(local, "rb") as f:
            if local.endswith(".pkl"):
                return _NumpyUnpickler(f, encoding="latin1").load()
            if local.endswith(".safetensors"):
                return {"model": safetensors.torch.load(f.read())}
            _check_sums(f)
            return torch.load(f, map_location="cpu", weights_only=True)
    except _Refused as error:
        raise WeightsError(
            f"{path}: refused, since it holds {error}, not only numpy arrays and plain values: "
            "loading it could run code"
        ) from None
    except Exception as error:  # readers raise what they like on foreign bytes
        # One that goes to a place in front of the file raises EINVAL: the file is at fault.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise WeightsError(
            f"{path}: {reader} can't read it; the file is damaged, or of another kind "
            f"({one_line(error)})"
        ) from error


def _check_sums(file: BinaryIO) -> None:
    """torch checks no checksum of the zip file that it writes: a flipped bit would go unnoticed."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} in it has a wrong checksum")
    file.seek(0)


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Write a state dict as safetensors; tensors that share memory are written one by one."""
    # save_file would keep the file from other users.
    content = safetensors.torch.save(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    )
    with PathManager.open(path, "wb") as f:
        f.write(content)


class SafeReader(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` that runs no code from the files that it reads, and reads
    safetensors too."""

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            # detectron2 would read these in its own way.
            loaded = _named_alike(filename, load_weights(filename))
        else:
            loaded = super()._load_file(filename)
        weights = loaded["model"]
        arrays = (torch.Tensor, np.ndarray, np.generic)
        if not isinstance(weights, Mapping) or not any(
            isinstance(value, arrays) for value in weights.values()
        ):
            raise WeightsError(f"{filename}: there are no weights in it")
        return loaded

    def _torch_load(self, f: str) -> Any:
        return load_weights(f)


def _named_alike(filename: str, content: Mapping[str, Any]) -> Dict[str, Any]:
    """A file of the model zoo as it is; one of Caffe2 or pycls to be matched by its names' ends."""
    if filename.endswith(".pkl") and "model" in content and "__author__" in content:
        return dict(content)
    author, key, dropped = (
        ("Caffe2", "blobs", "_momentum")
        if filename.endswith(".pkl")
        else ("pycls", "model_state", "num_batches_tracked")
    )
    weights = content.get(key, content)
    if isinstance(weights, Mapping):
        weights = {k: v for k, v in weights.items() if not str(k).endswith(dropped)}
    return {"model": weights, "__author__": author, "matching_heuristics": True}
