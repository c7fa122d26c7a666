"""The trainer's own parts: schedule, evaluators, data, refusals, and every config in configs/."""

import contextlib
import glob
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from helpers import distilling, tiny_cfg
from PIL import Image

from crosskd_ifc import ConfigError, CrossKDTrainer, Teacher
from crosskd_ifc.data.cards import register_card
from crosskd_ifc.data.loading import load_training_records
from crosskd_ifc.distillation.compatibility.settings import check_crosskd_config
from crosskd_ifc.experiments.runs import Run
from crosskd_ifc.modeling.attach import load_teacher_config
from crosskd_ifc.modeling.student import TeacherCandidate
from crosskd_ifc.training.preflight import check_keypoint_sigmas, check_training_config
from crosskd_ifc.training.preflight_data import check_classes
from crosskd_ifc.training.schedule import DistillationSchedule, scale_schedule

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs")
S = "MODEL.CROSSKD.SCHEDULE."
FUSION = "MODEL.CROSSKD.FUSION."


def test_the_schedule_starts_rises_linearly_and_stops():
    schedule = DistillationSchedule(start=2, warmup=4, stop=8)
    factors = [schedule.factor(i) for i in range(10)]
    assert factors == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0]
    assert [DistillationSchedule().factor(i) for i in (0, 10**6)] == [1, 1]


def test_the_schedule_scales_with_the_reference_world_size_like_the_solver():
    opts = (S + "START_ITER", 100, S + "WARMUP_ITERS", 50, "SOLVER.REFERENCE_WORLD_SIZE", 8)
    cfg = tiny_cfg(*opts, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.MAX_ITER", 1000)
    ours = scale_schedule(cfg, 2).MODEL.CROSSKD.SCHEDULE
    stock = DefaultTrainer.auto_scale_workers(cfg, 2)
    assert stock.SOLVER.MAX_ITER == 4000
    assert (ours.START_ITER, ours.WARMUP_ITERS, ours.STOP_ITER) == (400, 200, -1)
    assert scale_schedule(cfg, 8) is cfg
    # Four times the steps, and each counts a quarter: after 4 of them the same is left.
    cfg.SOLVER.EMA_DECAY = 0.9
    assert scale_schedule(cfg, 2).SOLVER.EMA_DECAY**4 == pytest.approx(0.9)
    short = tiny_cfg(S + "START_ITER", 999, S + "STOP_ITER", 1000, "SOLVER.REFERENCE_WORLD_SIZE", 1)
    ours = scale_schedule(short, 8).MODEL.CROSSKD.SCHEDULE
    assert (ours.START_ITER, ours.STOP_ITER) == (125, 126)
    assert cfg.MODEL.CROSSKD.SCHEDULE.START_ITER == 100


@pytest.fixture
def dataset():
    """Registers a data set of dicts under a name; forgotten afterwards."""
    names = []

    def register(dicts, **metadata):
        name = f"trainer_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, lambda: dicts)
        MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"], **metadata)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def picture(index, *boxes):
    return {
        "file_name": f"{index}.png",
        "image_id": index,
        "height": 64,
        "width": 64,
        "annotations": [
            {"bbox": list(b), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
            for b in boxes
        ],
    }


def test_the_evaluator_follows_the_data_sets_type(dataset, tmp_path):
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path))
    coco = dataset([picture(0, (1, 2, 9, 9))], evaluator_type="coco")
    assert isinstance(CrossKDTrainer.build_evaluator(cfg, coco), COCOEvaluator)
    voc = dataset([], evaluator_type="pascal_voc", dirname=str(tmp_path), split="test", year=2007)
    assert isinstance(CrossKDTrainer.build_evaluator(cfg, voc), PascalVOCDetectionEvaluator)
    other = dataset([], evaluator_type="lvis")
    with pytest.raises(ConfigError, match="DATASETS.TEST.*'lvis'.*'coco', 'pascal_voc'"):
        CrossKDTrainer.build_evaluator(cfg, other)


def test_the_training_data_loses_boxes_without_area_and_images_left_empty(dataset, caplog):
    good, flat = (1.0, 2.0, 9.0, 9.0), (5.0, 5.0, 5.0, 20.0)
    name = dataset([picture(0, good, flat), picture(1, flat), picture(2, good)])
    cfg = tiny_cfg("DATASETS.TRAIN", (name,))
    loader = CrossKDTrainer.build_train_loader(cfg)
    kept = loader.stream.records
    assert [(d["image_id"], len(d["annotations"])) for d in kept] == [(0, 1), (2, 1)]
    assert "ropped 2 boxes" in caplog.text and "0.png" in caplog.text


def test_the_trainer_with_augmentations_of_its_own_that_the_docs_show_loads_data(dataset, tmp_path):
    with open(os.path.join(CONFIGS, "..", "docs", "extending.md")) as f:
        section = f.read().split("## Your own trainer\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    exec(code, names)
    record = picture(0, (1.0, 2.0, 9.0, 9.0))
    record["file_name"] = str(tmp_path / "0.png")
    Image.new("RGB", (64, 64)).save(record["file_name"])
    name = dataset([record])
    cfg = tiny_cfg("DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", 0)
    sample, *_ = next(iter(names["MyTrainer"].build_train_loader(cfg)))
    assert min(sample["image"].shape[1:]) in (480, 640) and len(sample["instances"]) == 1


def test_training_data_without_a_usable_box_is_one_error_that_names_them(dataset):
    names = dataset([picture(0), picture(1)]), dataset([picture(2, (5.0, 5.0, 5.0, 20.0))])
    with pytest.raises(ConfigError, match=f"DATASETS.TRAIN.*{names[0]}.*{names[1]}.*3 images"):
        CrossKDTrainer.build_train_loader(tiny_cfg("DATASETS.TRAIN", names))
    one = dataset([picture(3, (1.0, 2.0, 9.0, 9.0))])
    cfg = tiny_cfg("DATASETS.TRAIN", (names[0], one))
    assert len(CrossKDTrainer.build_train_loader(cfg).stream.records) == 1
    cfg = tiny_cfg("DATASETS.TRAIN", names, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert len(CrossKDTrainer.build_train_loader(cfg).stream.records) == 3


def test_a_wrong_class_count_of_a_data_set_that_is_named_late_is_refused_when_it_is_loaded(
    tmp_path,
):
    coco = {"images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}]}
    coco["annotations"] = [
        {"id": 1, "image_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0, "category_id": 1}
    ]
    coco["categories"] = [{"id": i + 1, "name": c} for i, c in enumerate("abcde")]
    (tmp_path / "late.json").write_text(json.dumps(coco))
    register_coco_instances("late", {}, str(tmp_path / "late.json"), str(tmp_path))
    with pytest.raises(ConfigError, match="NUM_CLASSES is 3, but data set 'late' has 5 classes"):
        CrossKDTrainer.build_train_loader(tiny_cfg("DATASETS.TRAIN", ("late",)))


@pytest.fixture
def coco_sets(tmp_path):
    """Writes and registers a card without classes: split -> class names by category id."""

    def register(**splits):
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        for split, names in splits.items():
            content = {"images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}]}
            content["annotations"] = [
                {"id": 1, "image_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "category_id": 1}
            ]
            content["annotations"][0]["iscrowd"] = 0
            content["categories"] = [{"id": i, "name": n} for i, n in enumerate(names, 1)]
            (tmp_path / f"{split}.json").write_text(json.dumps(content))
        files = {split: {"json": f"{split}.json", "images": "."} for split in splits}
        card = {"name": "named", "format": "coco", "root": ".", "splits": files}
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
        register_card(str(tmp_path / "card.yaml"))
        return [f"named_{split}" for split in splits]

    return register


def sets_cfg(train, test, *opts):
    opts = ("DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test), *opts)
    return tiny_cfg("MODEL.CROSSKD.ENABLED", False, *opts)


OTHER_CLASSES = {
    "another order": ("bac", "class 0 is 'a' in 'named_train' and 'b' in "),
    "another name": ("abx", "class 2 is 'c' in 'named_train' and 'x' in "),
    "fewer": ("ab", "class 2 is 'c' in 'named_train' and missing in "),
    "more": ("abcd", "class 3 is missing in 'named_train' and 'd' in "),
}


@pytest.mark.parametrize("case", OTHER_CLASSES)
def test_a_test_set_of_other_classes_than_the_training_set_is_refused(case, coco_sets, tmp_path):
    names, message = OTHER_CLASSES[case]
    train, same, other = coco_sets(train="abc", same="abc", other=names)
    out = "OUTPUT_DIR", str(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"DATASETS.TEST: 'named_other'.*{message}"):
        CrossKDTrainer(sets_cfg([train], [same, other], *out))
    CrossKDTrainer(sets_cfg([train], [same], *out))


def test_training_sets_of_different_classes_are_refused(coco_sets):
    names = coco_sets(one="abc", two="acb")
    message = r"DATASETS.TRAIN: 'named_two'.*class 1 is 'b' in 'named_one' and 'c' in"
    with pytest.raises(ConfigError, match=message):
        CrossKDTrainer.build_train_loader(sets_cfg(names, []))


def test_classes_that_are_not_known_are_not_compared(coco_sets, dataset, tmp_path):
    train = coco_sets(train="abc")[0]
    nameless = dataset([picture(0, (1, 2, 9, 9))], evaluator_type="coco")
    MetadataCatalog.remove(nameless)
    MetadataCatalog.get(nameless).set(evaluator_type="coco")
    gone = dataset([], evaluator_type="coco")
    MetadataCatalog.remove(gone)
    MetadataCatalog.get(gone).set(evaluator_type="coco", json_file=str(tmp_path / "gone.json"))
    CrossKDTrainer(sets_cfg([train], [nameless], "OUTPUT_DIR", str(tmp_path / "out")))
    check_classes(sets_cfg([train], [nameless, gone]), evaluation=True)


def test_detectron2s_own_data_sets_have_the_same_classes():
    coco = sets_cfg(["coco_2017_train"], ["coco_2017_val", "coco_2017_val_100"])
    coco.MODEL.ROI_HEADS.NUM_CLASSES = 80
    voc = sets_cfg(["voc_2007_trainval", "voc_2012_trainval"], ["voc_2007_test"])
    voc.MODEL.ROI_HEADS.NUM_CLASSES = 20
    for cfg in (coco, voc):
        check_classes(cfg)
        check_classes(cfg, evaluation=True)


def test_an_evaluation_compares_the_classes_that_are_known(coco_sets):
    train, test, other, fewer = coco_sets(train="abc", test="abc", other="acb", fewer="ab")
    check_classes(sets_cfg([train], [test]), evaluation=True)
    check_classes(sets_cfg(["not_registered"], [test]), evaluation=True)
    # Training data of another number of classes aren't what the model has learned from.
    check_classes(sets_cfg([fewer, "coco_2017_train"], [test]), evaluation=True)
    with pytest.raises(ConfigError, match="'named_other'.*'named_train'.*set DATASETS.TRAIN"):
        check_classes(sets_cfg([train], [other]), evaluation=True)
    with pytest.raises(ConfigError, match="'named_other'.*'named_test'"):
        check_classes(sets_cfg([], [test, other]), evaluation=True)
    with pytest.raises(ConfigError, match="NUM_CLASSES is 3, but data set 'named_fewer' has 2"):
        check_classes(sets_cfg([], [fewer]), evaluation=True)


REFUSED = {
    "AMP on the CPU": (("SOLVER.AMP.ENABLED", True), "SOLVER.AMP.ENABLED.*MODEL.DEVICE"),
    "an unknown data set": (("DATASETS.TRAIN", ("no_such",)), "DATASETS.TRAIN.*'no_such'.*CARDS"),
    "an unknown test set": (("DATASETS.TEST", ("no_such",)), "DATASETS.TEST.*'no_such'"),
    "a missing card": (("DATASETS.CARDS", ("no_such.yaml",)), "(?s)DATASETS.CARDS.*no_such.yaml"),
    "too few classes": (
        ("DATASETS.TRAIN", ("crosskd_shapes_train",)),
        "NUM_CLASSES is 3.*crosskd_shapes_train.* 8",
    ),
    "too many classes": (
        ("DATASETS.TEST", ("crosskd_shapes_test",), "MODEL.ROI_HEADS.NUM_CLASSES", 80),
        "NUM_CLASSES is 80.*crosskd_shapes_test.* 8",
    ),
    "no weight": (
        (
            *("MODEL.CROSSKD.ENABLED", True, "MODEL.CROSSKD.TEACHER.CONFIG_FILE", "t.yaml"),
            *("MODEL.CROSSKD.LOSS.CLS_WEIGHT", 0.0, "MODEL.CROSSKD.LOSS.BOX_WEIGHT", 0.0),
        ),
        "CROSSKD.LOSS: all weights are 0.*ENABLED False",
    ),
    "a teacher's evaluation on nothing": (
        (
            *("MODEL.CROSSKD.ENABLED", True, "MODEL.CROSSKD.TEACHER.CONFIG_FILE", "t.yaml"),
            *("MODEL.CROSSKD.TEACHER.EVAL_AT_START", True),
        ),
        "TEACHER.EVAL_AT_START True needs a data set in DATASETS.TEST",
    ),
    "no teacher": (("MODEL.CROSSKD.ENABLED", True), "TEACHER.CONFIG_FILE is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_is_refused_before_anything_is_built(case):
    opts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        CrossKDTrainer(tiny_cfg("MODEL.CROSSKD.ENABLED", False, *opts))


def test_a_test_set_without_an_evaluator_is_refused_before_training(dataset):
    lvis = dataset([picture(0, (1, 2, 9, 9))], evaluator_type="lvis")
    cfg = tiny_cfg(
        "MODEL.CROSSKD.ENABLED", False, "DATASETS.TRAIN", (lvis,), "DATASETS.TEST", (lvis,)
    )
    with pytest.raises(ConfigError, match="DATASETS.TEST.*'lvis'"):
        CrossKDTrainer(cfg)


def test_a_schedule_that_never_starts_is_refused():
    opts = (
        "MODEL.CROSSKD.TEACHER.CONFIG_FILE",
        "t.yaml",
        S + "START_ITER",
        9,
        "SOLVER.MAX_ITER",
        9,
    )
    with pytest.raises(ConfigError, match="SCHEDULE.START_ITER is 9.*SOLVER.MAX_ITER, 9"):
        CrossKDTrainer(tiny_cfg(*opts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_config_without_a_gpu_says_what_to_add():
    with pytest.raises(ConfigError, match="MODEL.DEVICE is 'cuda'.*MODEL.DEVICE cpu"):
        check_training_config(tiny_cfg("MODEL.DEVICE", "cuda", "MODEL.CROSSKD.ENABLED", False))


def config_files():
    files = sorted(glob.glob(os.path.join(CONFIGS, "**", "*.yaml"), recursive=True))
    relative = [os.path.relpath(f, CONFIGS) for f in files]
    return [f for f in relative if not f.startswith("datasets")]


@pytest.mark.parametrize("config", config_files())
def test_every_config_merges_and_fits_its_teacher(config, tmp_path):
    # Big models have no values, but where something compares them: options of quick/, anchors.
    has_values = config.startswith("quick") or re.search("retinanet|fcos|recipe", config)
    device = "cpu" if has_values else "meta"
    cfg = Run("", config, str(tmp_path), ["MODEL.DEVICE", device]).cfg()
    if not cfg.DATASETS.CARDS:  # else their data needn't be here
        assert set(cfg.DATASETS.TRAIN + cfg.DATASETS.TEST) <= set(DatasetCatalog.list())
    with torch.device(device):
        model = build_model(cfg)
        if not cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE:
            return
        check_crosskd_config(cfg)
        teacher_cfg, weights = load_teacher_config(cfg)
        assert weights.startswith("https://") or weights.startswith("output/")
        teacher_cfg.MODEL.DEVICE = device
        teacher = build_model(teacher_cfg)
        teacher = Teacher(teacher, student_format=cfg.INPUT.FORMAT, cfg=teacher_cfg)
        model.set_teachers([TeacherCandidate(teacher, cfg)])
    name = os.path.basename(config)
    learning = ("weighted", "attention", "concat", "residual", "unlike", "mgd", "fgd")
    learns = any(name.startswith(x) for x in learning)
    assert learns == any(n.startswith("fusion.") for n, _ in model.named_parameters())


@pytest.mark.parametrize("config", config_files())
def test_no_config_takes_the_name_of_a_teacher_of_the_model_zoo(config):
    # The repository's configs are found first, so the zoo's could not be named any more.
    with pytest.raises(RuntimeError):
        model_zoo.get_checkpoint_url(config)


def distilled_configs():
    return [c for c in config_files() if Run("", c, "").cfg().MODEL.CROSSKD.TEACHER.CONFIG_FILE]


def baseline_of(config):
    """The first config below ``config`` that knows no teacher."""
    content = {"MODEL": {"CROSSKD": {}}}
    while "CROSSKD" in content.get("MODEL", {}):
        with open(os.path.join(CONFIGS, config)) as f:
            content = yaml.safe_load(f)
        baseline, base = config, content.get("_BASE_", "")
        config = os.path.normpath(os.path.join(os.path.dirname(config), base))
    return baseline


def test_the_baselines_are_plain_configs_and_most_options_have_a_config():
    pairs = {c: baseline_of(c) for c in distilled_configs()}
    assert len(pairs) > 20
    for config, baseline in pairs.items():
        name = os.path.basename(baseline)
        kinds = "((faster|mask|cascade)_rcnn|retinanet|fcos)_(R|mobilenet|efficientnet|convnext)"
        assert re.match(kinds, name), (config, baseline)


@pytest.mark.parametrize("config", distilled_configs())
def test_a_distilled_students_baseline_differs_in_nothing_but_the_distillation(config):
    ours, theirs = (Run("", c, "").cfg() for c in (config, baseline_of(config)))
    for cfg in (ours, theirs):
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.ROI_HEADS.NAME = ""
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = ""
        del cfg.MODEL["CROSSKD"]
    assert ours == theirs


def test_what_the_distillation_learns_has_a_weight_decay_of_its_own():
    opts = (FUSION + "NAME", "concat", FUSION + "IN_FEATURES", ("pool", "fc2"))
    student, _ = distilling(*opts, "SOLVER.WEIGHT_DECAY", 0.1, FUSION + "WEIGHT_DECAY", 0.02)
    cfg = tiny_cfg(*opts, "SOLVER.WEIGHT_DECAY", 0.1, FUSION + "WEIGHT_DECAY", 0.02)
    for clipping in (False, True):
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clipping
        optimizer = CrossKDTrainer.build_optimizer(cfg, student)
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        trainable = {n: p for n, p in student.named_parameters() if p.requires_grad}
        assert set(decay) == {id(p) for p in trainable.values()}
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trainable)
        for name, p in trainable.items():
            assert decay[id(p)] == (0.02 if name.startswith("fusion.") else 0.1), name


def test_without_adapters_the_optimizer_is_detectron2s():
    student, _ = distilling()
    ours, stock = (
        t.build_optimizer(tiny_cfg(), student).param_groups
        for t in (CrossKDTrainer, DefaultTrainer)
    )
    assert [[id(p) for p in g["params"]] for g in ours] == [
        [id(p) for p in g["params"]] for g in stock
    ]


def test_keypoints_are_evaluated_with_the_configs_sigmas(tmp_path):
    note = {"bbox": [1, 1, 5, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": "a.png", "image_id": 1, "height": 8, "width": 8, "annotations": [note]}
    DatasetCatalog.register("three_points", lambda: [record])
    MetadataCatalog.get("three_points").set(thing_classes=["a"], evaluator_type="coco")
    try:
        cfg = tiny_cfg("TEST.KEYPOINT_OKS_SIGMAS", (0.1, 0.2, 0.3))
        evaluator = CrossKDTrainer.build_evaluator(cfg, "three_points", str(tmp_path))
    finally:
        DatasetCatalog.remove("three_points")
        MetadataCatalog.remove("three_points")
    assert tuple(evaluator._kpt_oks_sigmas) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("count, sigmas, is_good", [(17, 0, 1), (3, 3, 1), (3, 0, 0), (17, 3, 0)])
def test_keypoints_without_a_sigma_each_are_refused_before_training(count, sigmas, is_good):
    opts = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", count)
    cfg = tiny_cfg(*opts, "TEST.KEYPOINT_OKS_SIGMAS", (0.1,) * sigmas)
    with contextlib.nullcontext() if is_good else pytest.raises(ConfigError, match="OKS_SIGMAS"):
        check_keypoint_sigmas(cfg)


def test_each_data_set_has_its_own_proposals(dataset, tmp_path):
    files, names = [], []
    for x in (1.0, 2.0):
        names.append(dataset([{**picture(1, [1, 1, 9, 9]), "image_id": 1}]))
        files.append(str(tmp_path / f"{x}.pkl"))
        content = {"ids": [1], "boxes": [np.array([[x, 0, 5, 5]])]}
        with open(files[-1], "wb") as f:
            pickle.dump({**content, "objectness_logits": [np.ones(1)]}, f)
    opts = ("MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", tuple(files))
    found = load_training_records(tiny_cfg("DATASETS.TRAIN", tuple(names), *opts))
    assert [r["proposal_boxes"][0][0] for r in found] == [1.0, 2.0]


def test_images_without_a_visible_keypoint_are_left_out_where_keypoints_are_trained(dataset):
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    pictures = [
        {**picture(i), "annotations": [{**box, "keypoints": [5, 5, v]}]}
        for i, v in enumerate((2, 0))
    ]
    name = dataset(pictures)
    for is_on, ids in ((True, [0]), (False, [0, 1])):
        cfg = tiny_cfg("DATASETS.TRAIN", (name,), "MODEL.KEYPOINT_ON", is_on)
        assert [r["image_id"] for r in load_training_records(cfg)] == ids
