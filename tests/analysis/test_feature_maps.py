"""Maps of where student and teacher respond differently."""

from types import SimpleNamespace

import matplotlib.text
import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import distilling, tiny_batch
from PIL import Image

from crosskd_ifc import ConfigError
from crosskd_ifc.analysis import feature_maps
from crosskd_ifc.analysis.feature_maps import (
    attention_difference,
    compare_features,
    feature_differences,
    shared_levels,
)


def test_the_difference_is_that_of_mean_absolute_responses_relative_to_their_mean():
    student = torch.tensor([[[1.0, -3.0]]])  # A = 1, 3; mean 2
    teacher = torch.tensor([[[-4.0, 2.0]], [[0.0, 2.0]]])  # two channels, A = 2, 2; mean 2
    found = attention_difference(student, teacher, (4, 8), 4)
    assert torch.equal(found, torch.tensor([[-0.5, 0.5]]))
    # Nor does the scale of either matter.
    assert torch.allclose(attention_difference(student * 100, teacher, (4, 8), 4), found)


def test_padding_counts_neither_in_the_map_nor_in_its_mean():
    student, teacher = torch.ones(2, 4, 5), torch.ones(3, 2, 3)
    student[:, 2:], student[:, :, 3:] = 1000, 1000
    # 5 x 9 pixels with stride 4: the last cells reach over the border.
    found = attention_difference(student, teacher, (5, 9), 4)
    assert found.shape == (2, 3) and not found.any()


def test_a_dead_level_is_a_response_of_zero():
    alive = torch.tensor([[[1.0, 3.0]]], dtype=torch.float16)
    found = attention_difference(torch.zeros(1, 1, 2), alive, (4, 8), 4)
    assert torch.equal(found, torch.tensor([[-0.5, -1.5]]))


def image_of(height, width):
    image = tiny_batch()[0]["image"][:, :height, :width]
    return {"image": image, "height": height, "width": width}


def test_a_student_that_is_its_own_teacher_differs_nowhere():
    student, _ = distilling(student_seed=1, teacher_seed=1)
    found = feature_differences(student.eval(), image_of(64, 40))
    assert {level: x.shape for level, x in found.items()} == {
        **{"p2": (16, 10), "p3": (8, 5), "p4": (4, 3), "p5": (2, 2)},
        "p6": (1, 1),
    }
    assert not any(x.any() for x in found.values())


def test_a_teacher_with_other_channels_can_be_compared():
    student, _ = distilling(teacher_opts=("MODEL.FPN.OUT_CHANNELS", 12))
    found = feature_differences(student.eval(), image_of(64, 64))
    for level in ("p2", "p3", "p4", "p5"):
        assert np.isfinite(found[level]).all() and found[level].any()
        assert abs(found[level].mean()) < 1e-5


def pair_of_levels(ours, theirs):
    def network(levels):
        shapes = {name: ShapeSpec(stride=stride) for name, stride in levels.items()}
        return SimpleNamespace(backbone=SimpleNamespace(output_shape=lambda: shapes))

    student = network(ours)
    student.teacher = SimpleNamespace(model=network(theirs), description="a toy")
    return student


def test_levels_are_shared_by_name_and_stride():
    student = pair_of_levels({"p2": 4, "p3": 8, "p4": 16}, {"p3": 8, "p4": 8, "p5": 32})
    assert shared_levels(student) == {"p3": 8}
    with pytest.raises(ConfigError, match="a toy.* no feature level"):
        compare_features(pair_of_levels({"p2": 4}, {"res4": 16}), [], "x.png")


def test_red_is_where_the_student_responds_more(tmp_path, monkeypatch):
    student, _ = distilling()
    grey = tmp_path / "grey.png"
    Image.new("RGB", (64, 48), (128, 128, 128)).save(grey)
    left = np.ones((12, 16), np.float32)
    left[:, 8:] = -1
    monkeypatch.setattr(
        feature_maps, "feature_differences", lambda *_: dict.fromkeys(shared_levels(student), left)
    )
    path = tmp_path / "maps.png"
    compare_features(student, [{**image_of(48, 64), "file_name": str(grey)}] * 2, str(path))
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    columns = {
        name: np.nonzero((sign * (picture[..., 0] - picture[..., 2]) > 30).sum(axis=0) > 100)[0]
        for name, sign in (("red", 1), ("blue", -1))
    }
    first_map = columns["red"][0]
    assert 240 < first_map < columns["blue"][0] < first_map + 240


@pytest.mark.parametrize("levels", [("p3",), ("p2", "p3", "p4", "p5", "p6")])
@pytest.mark.parametrize("photos", [1, 2])
@pytest.mark.parametrize("height, width", [(32, 64), (64, 32), (64, 64)])
def test_no_text_is_cut_off_or_covered(monkeypatch, tmp_path, levels, photos, height, width):
    student, _ = distilling()
    all_levels = shared_levels(student)
    picked = {name: all_levels[name] for name in levels}
    monkeypatch.setattr(feature_maps, "shared_levels", lambda _: picked)
    figures = []
    monkeypatch.setattr(feature_maps, "save_figure", lambda figure, path: figures.append(figure))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (width, height), (128, 128, 128)).save(photo)
    inputs = [{**image_of(height, width), "file_name": str(photo)}] * photos
    compare_features(student, inputs, "unused.png")
    (figure,) = figures
    figure.canvas.draw()
    drawn = figure.get_tightbbox(figure.canvas.get_renderer())  # inches
    assert drawn.x0 >= 0 and drawn.x1 <= figure.get_figwidth()
    assert drawn.y0 >= 0 and drawn.y1 <= figure.get_figheight()
    texts = {text.get_text(): text for text in figure.findobj(matplotlib.text.Text)}
    title = next(text for words, text in texts.items() if words.startswith("Spatial attention"))
    assert title.get_window_extent().y0 >= texts["image"].get_window_extent().y1
