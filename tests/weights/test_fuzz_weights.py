"""Random tensors, metadata and bytes in weight files: read, or one error that names the file."""

import pickle
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from helpers import tiny_cfg, tiny_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crosskd_ifc.weights.reading import load_weights, save_safetensors
from crosskd_ifc.weights.student import load_student

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
COMMON = dict(deadline=None, derandomize=True, suppress_health_check=SLOW)
TEXT = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PLAIN = torch.arange(6.0).view(2, 3)
TENSORS = st.sampled_from(
    [
        *(PLAIN, PLAIN.t(), PLAIN[:, 1], PLAIN[:0], PLAIN[1, 1], PLAIN / 0, PLAIN.new_ones(())),
        *(PLAIN.half(), PLAIN.bfloat16(), PLAIN.to(torch.float8_e5m2), PLAIN.to(torch.complex64)),
        *(PLAIN > 1, PLAIN.byte(), PLAIN.long(), torch.nn.Parameter(PLAIN)),
        *(PLAIN.to_sparse(), PLAIN.to("meta"), torch.zeros(1).expand(9_999, 9_999)),
        torch.zeros(2, 1).expand(2, 3),
        PLAIN.as_strided((2, 2), (1, 1)),
    ]
)
METADATA = st.sampled_from(
    ["optimizer", "iteration", "config", "matching_heuristics", "__author__", "model_state"]
)


def read_or_refuse(path, read):
    try:
        return read(str(path))
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 1500
    return None


@settings(max_examples=200, **COMMON)
@given(
    st.dictionaries(TEXT, TENSORS | VALUES, max_size=4),
    st.dictionaries(METADATA | TEXT, TENSORS | VALUES, max_size=3),
)
def test_random_tensors_are_plain_when_they_are_read(tmp_path, weights, more):
    path = tmp_path / "weights.pth"
    torch.save({**more, "model": weights}, path)
    found = read_or_refuse(path, load_weights)
    if found is not None:
        assert isinstance(found, Mapping)
        for value in found["model"].values():
            if isinstance(value, torch.Tensor):
                assert value.numel() < 10 and value.clone().layout == torch.strided


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder with a config, content of a checkpoint of it)."""
    folder, cfg = tmp_path_factory.mktemp("run"), tiny_cfg()
    (folder / "config.yaml").write_text(cfg.dump())
    return folder, {"model": tiny_model(cfg).state_dict(), "iteration": 1}


NAMES = st.sampled_from(list(tiny_model().state_dict())) | TEXT


@settings(max_examples=25, **COMMON)
@given(
    st.dictionaries(NAMES, TENSORS | VALUES, max_size=2),
    st.dictionaries(METADATA | TEXT, TENSORS | VALUES, max_size=2),
)
def test_a_changed_checkpoint_is_a_student_or_one_error(checkpoint, weights, more):
    folder, content = checkpoint
    torch.save({**content, **more, "model": {**content["model"], **weights}}, folder / "x.pth")
    student = read_or_refuse(folder / "x.pth", load_student)
    assert student is None or not set(weights) - set(content["model"])


def write(suffix, path):
    arrays = {"w": np.arange(6.0, dtype="f4"), "n": np.float32(1), "b": np.ones((2, 2), bool)}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    elif suffix == "safetensors":
        save_safetensors({"w": PLAIN, "b": PLAIN > 1}, str(path))
    else:
        torch.save({"model": {"w": PLAIN}}, path)


@settings(max_examples=200, **COMMON)
@given(
    st.sampled_from(["pkl", "safetensors", "pth"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1),
)
@example("pth", [(0.96875, 1)])  # a zip file whose directory would start in front of it
def test_a_file_with_changed_bytes_is_read_or_one_error(tmp_path, suffix, changes):
    path = tmp_path / f"weights.{suffix}"
    write(suffix, path)
    data = bytearray(path.read_bytes())
    for place, mask in changes:
        data[int(place * len(data))] ^= mask
    path.write_bytes(data)
    found = read_or_refuse(path, load_weights)
    assert found is None or isinstance(found, Mapping)


def test_a_number_in_a_pickle_does_not_reserve_memory(tmp_path):
    # PROTO 2, EMPTY_DICT, LONG_BINPUT 2**31 - 1, STOP
    (tmp_path / "weights.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    assert load_weights(str(tmp_path / "weights.pkl")) == {}
