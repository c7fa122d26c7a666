"""Files of weights, read without running code from them: torch's, safetensors, and the pickles of
detectron2's model zoo."""

import os
import pickle
import zipfile
import zlib
from typing import Any, Dict, Iterable, List, Mapping

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .state_dicts import ADAPTER_PREFIX, describe_problems

# All that a pickled dict of numpy arrays is made of; old and new names of numpy's modules.
_ADMITTED = {
    ("_codecs", "encode"),  # bytes in pickles of protocol 2
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


class WeightsError(ValueError):
    """A file of weights can't be read, or must not be."""


class MisfitError(WeightsError):
    """Weights don't fit the model that they are for."""


class _Refused(pickle.UnpicklingError):
    pass


class _NumpyUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; looking up anything else is where code would
    start to run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


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
    if not os.path.isfile(local):
        raise FileNotFoundError(f"{path}: no such file")
    content = _read(local, path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: there are no weights in it")
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


def _is_finite(value: Any) -> bool:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return bool(np.isfinite(value).all())
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(value.isfinite().all())
    return True


def _read(local: str, path: str) -> Any:
    if local.endswith(".pkl"):
        return _load_pickle(local, path)
    if local.endswith(".safetensors"):
        try:
            return {"model": load_file(local)}
        except (SafetensorError, ValueError) as error:
            raise WeightsError(f"{path}: safetensors can't read it ({error})") from error
    _check_sums(local, path)
    try:
        return torch.load(local, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises what it likes on foreign bytes
        raise WeightsError(
            f"{path}: torch can't read it as tensors and plain values ({type(error).__name__})"
        ) from error


def _check_sums(local: str, path: str) -> None:
    """torch checks no checksum of the zip file that it writes: a flipped bit would go unnoticed."""
    if not zipfile.is_zipfile(local):
        return
    try:
        with zipfile.ZipFile(local) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:
        raise WeightsError(f"{path}: the file is damaged ({error})") from error
    if damaged is not None:
        raise WeightsError(f"{path}: the file is damaged: {damaged} in it has a wrong checksum")


def _load_pickle(local: str, path: str) -> Any:
    try:
        with open(local, "rb") as f:
            return _NumpyUnpickler(f, encoding="latin1").load()
    except _Refused as error:
        raise WeightsError(
            f"{path}: refused, since it holds {error}, not only numpy arrays and plain values: "
            "loading it could run code"
        ) from None
    except OSError:
        raise
    except Exception as error:  # as does pickle
        reason = f"{type(error).__name__} {error}".strip()
        raise WeightsError(
            f"{path}: it can't be read as a pickle of numpy arrays ({reason})"
        ) from error


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Write a state dict as safetensors; tensors that share memory are written one by one."""
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)


class SafeReader(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` that runs no code from the files that it reads, and reads
    safetensors too."""

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            # What passes here runs no code when detectron2 reads it in its own way.
            load_weights(filename)
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


class StrictReader(SafeReader):
    """Loads all of a detector or fails: what is missing would quietly stay random."""

    def _load_model(self, checkpoint):
        """
        Raises:
            MisfitError: unless all keys and shapes fit, less those of distillation adapters.
        """
        incompatible = super()._load_model(checkpoint)
        # fvcore reports a key of another shape as missing, too.
        other_shape = {k for k, _, _ in incompatible.incorrect_shapes}
        problems = describe_problems(
            missing=_of_detector(k for k in incompatible.missing_keys if k not in other_shape),
            unexpected=_of_detector(incompatible.unexpected_keys),
            wrong_shapes=[
                f"{k} {found} instead of {expected}"
                for k, found, expected in incompatible.incorrect_shapes
            ],
        )
        if problems:
            raise MisfitError(problems)
        return incompatible


def _of_detector(keys: Iterable[str]) -> List[str]:
    return [k for k in keys if not k.startswith(ADAPTER_PREFIX)]
