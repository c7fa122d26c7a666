"""Files of weights: round trips, damage, and pickles that would run code."""

import builtins
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from helpers import tiny_cfg, tiny_model
from PIL import Image

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.analysis.pictures import inspect_pair
from crosskd_ifc.training.checkpointer import CheckpointError, SafeCheckpointer
from crosskd_ifc.weights import convert, reading
from crosskd_ifc.weights.export import export_student
from crosskd_ifc.weights.reading import load_weights, save_safetensors

STOCK = tiny_cfg(architecture="GeneralizedRCNN")


class Calls:
    """Unpickles to the result of a call."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def malicious(marker):
    """Name -> content that makes the file ``marker`` when it is unpickled without care."""
    command = f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(builtins.eval, command),
        "exec": Calls(builtins.exec, command),
        "open": Calls(builtins.open, str(marker), "w"),
        "getattr": Calls(builtins.getattr, Calls(builtins.open, str(marker), "w"), "close"),
        "partial": Calls(__import__("functools").partial, os.system, f"touch {marker}"),
        "numpy's loader": Calls(np.load, Calls(builtins.open, str(marker), "w")),
    }
    contents = {name: {"model": call, "__author__": "x"} for name, call in calls.items()}
    call = calls["exec"]
    contents["in an array"] = {"model": {"w": np.array([call], dtype=object)}, "__author__": "x"}
    contents["in a mapping"] = collections.OrderedDict(model=collections.OrderedDict(w=call))
    contents["as a key"] = {"model": {}, "__author__": {(call, 1): 2}}
    return contents


NAMES = list(malicious("x"))


def write_pickle(content, path):
    with open(path, "wb") as f:
        pickle.dump(content, f, protocol=2)


def into_teacher(path, folder):
    (folder / "teacher.yaml").write_text(STOCK.dump())
    keys = "MODEL.CROSSKD.TEACHER.CONFIG_FILE", "MODEL.CROSSKD.TEACHER.WEIGHTS"
    cfg = tiny_cfg(keys[0], str(folder / "teacher.yaml"), keys[1], str(path))
    attach_teacher(tiny_model(cfg), cfg)


def into_student(path, folder):
    SafeCheckpointer(tiny_model(STOCK)).load(str(path))


def into_resumed_run(path, folder):
    (folder / "last_checkpoint").write_text(path.name)
    SafeCheckpointer(tiny_model(STOCK), str(folder)).resume_or_load("", resume=True)


def into_converter(path, folder):
    convert.convert_file(str(path), str(folder / "converted.pth"))


def into_export(path, folder):
    (folder / "config.yaml").write_text(STOCK.dump())
    export_student(str(path), str(folder / "exported"))


def into_pictures(path, folder):
    (folder / "teacher.yaml").write_text(STOCK.dump())
    bare(tiny_model(STOCK), folder / "teacher.pth")
    Image.new("RGB", (64, 64)).save(folder / "image.png")
    settings = {
        "MODEL.CROSSKD.TEACHER.CONFIG_FILE": str(folder / "teacher.yaml"),
        "MODEL.CROSSKD.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
        "MODEL.WEIGHTS": str(path),
    }
    cfg = tiny_cfg(*(x for pair in settings.items() for x in pair))
    inspect_pair(cfg, str(folder / "pictures"), images=[str(folder / "image.png")])


PATHS = [
    *(into_teacher, into_student, into_resumed_run, into_converter, into_export),
    into_pictures,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
@pytest.mark.parametrize("load", PATHS, ids=lambda f: f.__name__)
def test_a_file_that_would_run_code_is_refused_wherever_it_is_loaded(load, suffix, name, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / f"weights.{suffix}"
    content = malicious(marker)[name]
    if suffix == "pkl":
        write_pickle(content, path)
    else:
        torch.save(content, path)
    with pytest.raises((ConfigError, CheckpointError, ValueError), match=f"weights.{suffix}"):
        load(path, tmp_path)
    assert not marker.exists()
    if suffix == "pkl":  # the test's own check: the file does what it is refused for
        with open(path, "rb") as f:
            try:
                pickle.load(f)
            except Exception:
                pass
        assert marker.exists() or name == "partial"


def zoo_pickle(model, path):
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    write_pickle({"model": arrays, "__author__": "Detectron2 Model Zoo"}, path)


def bare(model, path):
    torch.save(model.state_dict(), path)


def checkpoint(model, path):
    DetectionCheckpointer(model, str(path.parent)).save(path.stem, iteration=3)


def safetensors(model, path):
    save_safetensors(model.state_dict(), str(path))


FORMATS = [("pkl", zoo_pickle), ("pth", bare), ("pth", checkpoint), ("safetensors", safetensors)]


@pytest.mark.parametrize("suffix, save", FORMATS, ids=lambda x: getattr(x, "__name__", x))
def test_every_format_gives_teachers_and_students_the_same_weights(suffix, save, tmp_path):
    source, path = tiny_model(STOCK, seed=5), tmp_path / f"weights.{suffix}"
    save(source, path)
    student = tiny_model(STOCK, seed=6)
    SafeCheckpointer(student).load(str(path))
    (tmp_path / "teacher.yaml").write_text(STOCK.dump())
    keys = "MODEL.CROSSKD.TEACHER.CONFIG_FILE", "MODEL.CROSSKD.TEACHER.WEIGHTS"
    cfg = tiny_cfg(keys[0], str(tmp_path / "teacher.yaml"), keys[1], str(path))
    teacher = attach_teacher(tiny_model(cfg), cfg).model
    for name, value in source.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
        assert torch.equal(value, teacher.state_dict()[name])


def test_a_caffe2_pickle_is_read_as_detectron2_reads_it(tmp_path):
    path = tmp_path / "R-50.pkl"
    blobs = {"conv1_w": np.ones((8, 3, 7, 7), "float32"), "conv1_w_momentum": np.zeros(1)}
    write_pickle({"blobs": blobs}, path)
    models = [tiny_model(STOCK, seed=s) for s in (1, 2)]
    SafeCheckpointer(models[0]).load(str(path))
    DetectionCheckpointer(models[1]).load(str(path))
    name = "backbone.bottom_up.stem.conv1.weight"
    assert (models[0].state_dict()[name] == 1).all()
    assert torch.equal(models[0].state_dict()[name], models[1].state_dict()[name])


def test_numpy_scalars_and_bytes_of_old_pickles_are_admitted(tmp_path):
    content = {"a": np.float32(2), "b": b"bytes", "c": np.arange(3), "d": [1, (2.0, None)]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        found = load_weights(str(path))
        assert found["a"] == 2 and list(found["c"]) == [0, 1, 2] and found["d"] == [1, (2.0, None)]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("suffix, save", FORMATS, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_file_is_one_error_that_names_it(suffix, save, damage, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    save(tiny_model(STOCK), path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-500], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=f"weights.{suffix}: .*can't"):
        load_weights(str(path))
    with pytest.raises(ConfigError, match=f"TEACHER.WEIGHTS.*weights.{suffix}"):
        into_teacher(path, tmp_path)


def flip_bits(path):
    """Overwrite a part of the largest tensor in a file of torch's."""
    with zipfile.ZipFile(path) as archive:
        tensors = [x for x in archive.infolist() if "/data/" in x.filename]
    record, data = max(tensors, key=lambda x: x.file_size), path.read_bytes()
    middle = record.header_offset + record.compress_size // 2
    path.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])


@pytest.mark.parametrize("load", [into_teacher, into_student, into_export])
def test_flipped_bits_in_a_tensor_are_found_by_the_files_checksums(load, tmp_path):
    path = tmp_path / "weights.pth"
    checkpoint(tiny_model(STOCK), path)
    flip_bits(path)
    torch.load(path, weights_only=True)  # torch reads it
    with pytest.raises(
        ValueError, match=r"weights.pth: torch can't read it; the file is damaged.*wrong checksum"
    ):
        load(path, tmp_path)


def test_a_resumed_run_passes_over_a_checkpoint_with_flipped_bits(tmp_path):
    model, names = tiny_model(STOCK), ("model_0000001.pth", "model_0000003.pth")
    for name in names:
        SafeCheckpointer(model, str(tmp_path)).save(name[:-4], iteration=int(name[6:13]))
    flip_bits(tmp_path / names[1])
    resumed = SafeCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert resumed["iteration"] == 1


@pytest.mark.parametrize("content", [[1], {"model": {"a": 3}}, {"model": [1]}, {"a": "b"}, 5])
@pytest.mark.parametrize("load", [into_teacher, into_student])
def test_a_file_without_weights_is_refused_by_name(load, content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth.*no weights in it"):
        load(tmp_path / "weights.pth", tmp_path)


@pytest.mark.parametrize(
    "suffix, key", [("pyth", "model_state"), ("pkl", "blobs"), ("pth", "state_dict")]
)
def test_a_nan_below_other_keys_is_found(suffix, key, tmp_path):
    path, bad = tmp_path / f"weights.{suffix}", np.array([1.0, float("nan")], dtype=np.float32)
    if suffix == "pkl":
        write_pickle({key: {"w": bad}}, path)
    else:
        torch.save({key: {"w": torch.from_numpy(bad)}}, path)
    with pytest.raises(ValueError, match="weights.*hold NaN or infinity: w"):
        load_weights(str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix, save", FORMATS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("load", PATHS, ids=lambda f: f.__name__)
def test_weights_that_are_not_finite_are_refused_by_name(load, suffix, save, value, tmp_path):
    model, path = tiny_model(STOCK), tmp_path / f"weights.{suffix}"
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight[0, 0] = value
    save(model, path)
    message = f"weights.{suffix}: 1 of its tensors hold NaN or infinity: .*cls_score.weight"
    with pytest.raises((ValueError, CheckpointError), match=message):
        load(path, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder; name a file in it"):
        load_weights(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="gone.pth: no such file"):
        load_weights(str(tmp_path / "gone.pth"))


def test_tensors_that_share_memory_are_written_as_safetensors(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_safetensors({"a": x, "b": x, "c": x.t(), "d": x[0]}, str(tmp_path / "x.safetensors"))
    found = load_weights(str(tmp_path / "x.safetensors"))["model"]
    assert torch.equal(found["b"], x) and torch.equal(found["c"], x.t())


def test_an_exported_student_comes_as_safetensors_too_and_is_exported_from_there(tmp_path):
    model = tiny_model(STOCK, seed=5)
    checkpoint(model, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(STOCK.dump())
    export_student(str(tmp_path / "model_final.pth"), str(tmp_path / "out"), safetensors=True)
    path = tmp_path / "out" / "model.safetensors"
    found, again = load_weights(str(path))["model"], tmp_path / "again"
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    export_student(str(path), str(again), config_file=str(tmp_path / "config.yaml"))
    assert torch.load(again / "model.pth")["model"].keys() == found.keys()
    with pytest.raises(FileExistsError, match="model.safetensors|out exists"):
        export_student(str(tmp_path / "model_final.pth"), str(tmp_path / "out"), safetensors=True)


class WithState:
    """Unpickles to a call's result that is then given a state."""

    def __init__(self, function, arguments, state):
        self._reduced = function, arguments, state

    def __reduce__(self):
        return self._reduced


OBJECT_FIELD = (3, "|", None, ("x",), {"x": (np.dtype("O"), 0)}, 8, 8, 63)
CRAFTED = {
    "plain name, object field": WithState(np.dtype, ("V8", False, True), OBJECT_FIELD),
    "float, object field": WithState(np.dtype, ("f8", False, True), OBJECT_FIELD),
    **{str(d): np.dtype(d) for d in ("O", "S4", "U4", "V4", "M8[s]", "c8", ">f4", [("x", "O")])},
    "not a name": WithState(np.dtype, ([("x", "O")], False, True), None),
}


@pytest.mark.parametrize("dtype", CRAFTED.values(), ids=CRAFTED)
def test_an_array_of_anything_but_plain_numbers_is_refused(dtype, tmp_path):
    from numpy._core.multiarray import _reconstruct

    state = (1, (1,), dtype, False, b"\x10" * 8)
    array = WithState(_reconstruct, (np.ndarray, (0,), b"b"), state)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": {"w": array}}, protocol))
        with pytest.raises(ValueError, match="weights.pkl: refused, since it holds numpy.dtype"):
            load_weights(str(tmp_path / "weights.pkl"))


def test_plain_arrays_of_every_layout_and_protocol_are_read(tmp_path):
    shapes = [(), (0, 3), (2, 3)]
    kinds = ["?", "i1", "i8", "u1", "f2", "f4", "f8"]
    arrays = {f"{k}{s}": np.ones(s, k) for k in kinds for s in shapes}
    arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
        found = load_weights(str(tmp_path / "weights.pkl"))["model"]
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
            torch.from_numpy(found[name])


@pytest.mark.parametrize("suffix", ["pkl", "pyth", "pth"])
def test_a_file_that_changes_after_its_check_runs_no_code(suffix, tmp_path, monkeypatch):
    marker, path = tmp_path / "marker", tmp_path / f"weights.{suffix}"
    model, key = tiny_model(STOCK), "model_state" if suffix == "pyth" else "model"
    if suffix == "pkl":
        zoo_pickle(model, path)
    else:
        torch.save({key: model.state_dict()}, path)

    def load_and_change(name):
        content = load_weights(name)
        write_pickle(malicious(marker)["exec"], path)
        return content

    monkeypatch.setattr(reading, "load_weights", load_and_change)
    into_student(path, tmp_path)
    assert not marker.exists()


def test_a_pycls_file_is_read_as_detectron2_reads_it(tmp_path):
    path, name = tmp_path / "weights.pyth", "backbone.bottom_up.stem.conv1.weight"
    weights = {"stem.conv1.weight": torch.ones(8, 3, 7, 7), "x.num_batches_tracked": torch.ones(1)}
    torch.save({"model_state": weights}, path)
    model = tiny_model(STOCK)
    SafeCheckpointer(model).load(str(path))
    assert (model.state_dict()[name] == 1).all()


def quantized():
    # Of torch's own, it warns that quantization moves elsewhere.
    return torch._empty_affine_quantized([3], scale=0.1, zero_point=0, dtype=torch.qint8)


ODD_TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed sparse": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "quantized": quantized,
    "expanded": lambda: torch.zeros(1).expand(80_000, 80_000),
}


@pytest.mark.parametrize("inside", ["model", "optimizer"])
@pytest.mark.parametrize("make", ODD_TENSORS.values(), ids=ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_a_tensor_that_is_not_plain_memory_is_refused_and_a_resume_falls_back(
    make, inside, tmp_path
):
    model = tiny_model(STOCK)
    SafeCheckpointer(model, str(tmp_path)).save("model_0000001", iteration=1)
    content = {"model": model.state_dict(), "optimizer": {"state": [{}]}, "iteration": 3}
    name = "roi_heads.box_predictor.cls_score.bias"
    (content["model"] if inside == "model" else content["optimizer"]["state"][0])[name] = make()
    torch.save(content, tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(ValueError, match="model_0000003.pth: .*cls_score.bias is .* tensor"):
        load_weights(str(tmp_path / "model_0000003.pth"))
    resumed = SafeCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert resumed["iteration"] == 1


def test_tensors_that_share_a_part_of_memory_are_plain(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    weights = {"t": x.t(), "column": x[:, 1], "scalar": x[0, 0], "none": x[:0]}
    torch.save({"model": weights}, tmp_path / "weights.pth")
    found = load_weights(str(tmp_path / "weights.pth"))["model"]
    assert all(torch.equal(found[k], v) for k, v in weights.items())


def test_a_damaged_file_of_any_compression_is_one_error(tmp_path):
    save = io.BytesIO()
    torch.save(tiny_model(STOCK).state_dict(), save)
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED):
        path = tmp_path / "weights.pth"
        with zipfile.ZipFile(save) as source, zipfile.ZipFile(path, "w", kind) as archive:
            for name in source.namelist():
                archive.writestr(name, source.read(name))
        data = bytearray(path.read_bytes())
        for place in range(200, len(data) - 4000, 300):
            data[place] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(ValueError, match="weights.pth: "):
            load_weights(str(path))
