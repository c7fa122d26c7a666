"""Teachers from LazyConfig files: the zoo's, shrunk, with random weights."""

import builtins
import sys

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from helpers import tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import dense_cfg, telling

from crosskd_ifc import ConfigError, CrossKDTrainer, attach_teacher
from crosskd_ifc.analysis.detections import predict_all
from crosskd_ifc.distillation.teacher import TeacherPass
from crosskd_ifc.modeling.attach import load_teacher_config
from crosskd_ifc.training.schedule import evaluate_teacher

CASCADE_STUDENT = (
    *("MODEL.ROI_HEADS.NAME", "CrossKDCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
T = "MODEL.CROSSKD.TEACHER."
NARROW = (
    *("model.roi_heads.num_classes=3", "model.roi_heads.box_predictor.input_shape.channels=32"),
    *("model.backbone.out_channels=32", "model.proposal_generator.head.in_channels=32"),
    "model.roi_heads.box_head.input_shape.channels=32",
)
MASK = ("model.roi_heads.mask_head.input_shape.channels=32",)
TWO_FC = ("model.roi_heads.box_head.fc_dims=[32,32]", *MASK)
CONVS = ("model.roi_heads.box_head.conv_dims=[32,32]", "model.roi_heads.box_head.fc_dims=[32]")
SHRUNK = {
    "LSJ": (
        "new_baselines/mask_rcnn_R_101_FPN_100ep_LSJ.py",
        ("model.backbone.bottom_up.stages.depth=50", *CONVS, *MASK, *NARROW),
    ),
    "ViTDet": (
        "common/models/mask_rcnn_vitdet.py",
        (
            *("model.backbone.net.embed_dim=32", "model.backbone.net.depth=2"),
            *("model.backbone.net.num_heads=2", "model.backbone.net.img_size=128"),
            *("model.backbone.net.window_block_indexes=[0]", "model.backbone.square_pad=128"),
            *("model.backbone.net.window_size=3", *CONVS, *MASK, *NARROW),
        ),
    ),
    "RegNet": (
        "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py",
        (*TWO_FC, *NARROW),
    ),
    "keypoints": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py",
        (
            *("model.roi_heads.keypoint_head.input_shape.channels=32", *TWO_FC[:1], *NARROW),
            "model.roi_heads.keypoint_head.conv_dims=[32]",
        ),
    ),
}
BACKBONES = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, MViT, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
top = L(LastLevelMaxPool)()
swin = L(SwinTransformer)(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=3)
mvit = L(MViT)(
    embed_dim=16, depth=4, num_heads=1, last_block_indexes=[0, 1, 2, 3],
    residual_pooling=True, drop_path_rate=0.0,
    out_features=("scale2", "scale3", "scale4", "scale5"),
)
model.backbone.bottom_up = {which}
model.backbone.in_features = {features}
model.backbone.square_pad = {square}
model.input_format = "RGB"
"""


@pytest.fixture(params=[*SHRUNK, "Swin", "MViT"])
def files(request, tmp_path):
    """(config, overrides) of a two-stage teacher."""
    if request.param in SHRUNK:
        return SHRUNK[request.param]
    which, features, square = {
        "Swin": ("swin", ["p0", "p1", "p2", "p3"], 0),
        "MViT": ("mvit", ["scale2", "scale3", "scale4", "scale5"], 128),
    }[request.param]
    path = tmp_path / "teacher.py"
    path.write_text(BACKBONES.format(which=which, features=features, square=square))
    return str(path), (*TWO_FC, *NARROW)


def stock_model(name, overrides, seed=3):
    """As detectron2's own tools build it, with random weights and statistics."""
    path = model_zoo.get_config_file(name) if not name.startswith("/") else name
    cfg = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides))
    torch.manual_seed(seed)
    model = instantiate(cfg.model).eval()
    for key, x in model.state_dict().items():
        if key.endswith("running_mean"):
            x.normal_(std=0.1)
        elif key.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif "rel_pos" in key:
            x.normal_(std=0.1)
    return model


@pytest.fixture
def saved(tmp_path):
    """Writes a model's weights; they are too large to be left behind."""
    path = tmp_path / "teacher.pth"

    def save(model):
        torch.save({"model": model.state_dict()}, path)
        return str(path)

    yield save
    path.unlink(missing_ok=True)


def attached(cfg):
    torch.manual_seed(1)
    student = build_model(cfg)
    attach_teacher(student, cfg)
    return student.train()


def test_its_logits_on_the_students_rois_are_the_stock_models_and_it_teaches(files, saved):
    name, overrides = files
    stock = stock_model(name, overrides)
    cfg = tiny_cfg(
        *(T + "CONFIG_FILE", name, T + "OPTS", overrides, T + "WEIGHTS", saved(stock)),
        *("INPUT.MAX_SIZE_TRAIN", 128),
    )
    student, batch = attached(cfg), tiny_batch()
    losses, _ = train_losses(student, batch)
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0
    sum(losses.values()).backward()
    assert student.roi_heads.box_head.fc1.weight.grad.abs().sum() > 0
    boxes = [x["instances"].gt_boxes for x in batch]
    found, _ = student.distiller.box.predict(TeacherPass(student.teacher, batch), boxes)
    order = [0, 1, 2] if stock.input_format == "BGR" else [2, 1, 0]
    theirs = [{**x, "image": x["image"][order]} for x in batch]
    with torch.no_grad():
        features = stock.backbone(stock.preprocess_image(theirs).tensor)
        heads = stock.roi_heads
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
    assert (found.logits - logits).abs().max() <= 1e-6
    assert (found.deltas - deltas).abs().max() <= 1e-6
    assert logits.std(dim=0).max() > 1e-4  # they tell boxes apart
    # It teaches each stage of a Cascade R-CNN, too.
    cfg = tiny_cfg(*CASCADE_STUDENT, "INPUT.MAX_SIZE_TRAIN", 128)
    cascade = build_model(cfg)
    attach_teacher(cascade, cfg, teacher=student.teacher.model)
    losses, _ = train_losses(cascade.train(), batch)
    assert all(losses[f"loss_cls_stage{k}_kd"] > 0 for k in range(3))


RETINANETS = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

model = model_zoo.get_config("common/models/retinanet.py").model
swin = L(SwinTransformer)(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=3)
regnet = model_zoo.get_config(
    "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py"
).model.backbone.bottom_up
regnet.norm = "SyncBN"
model.backbone.bottom_up = {which}
model.backbone.in_features = {features}
model.backbone.top_block.update(in_feature={features}[-1], in_channels={channels})
model.pixel_mean, model.pixel_std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
model.input_format = "RGB"
"""
RETINANET = "model.head.prior_prob=0.01"
DENSE_SHRUNK = {
    "FCOS": ("COCO-Detection/fcos_R_50_FPN_1x.py", "model.head.conv_dims=[256,256,256,256]"),
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_1x.py", RETINANET),
    "RetinaNet swin": (["p1", "p2", "p3"], 96),
    "RetinaNet regnet": (["s2", "s3", "s4"], 1088),
}


@pytest.mark.parametrize("kind", DENSE_SHRUNK)
@pytest.mark.parametrize("student_format", ["BGR", "RGB"])
def test_dense_lazyconfig_teachers_answer_as_stock(kind, student_format, saved, tmp_path):
    name, override = DENSE_SHRUNK[kind]
    kind, _, which = kind.partition(" ")
    if which:
        text = RETINANETS.format(which=which, features=name, channels=override)
        (tmp_path / "dense.py").write_text(text)
        name, override = str(tmp_path / "dense.py"), RETINANET
    overrides = (override, "model.num_classes=3")
    stock = telling(stock_model(name, overrides), 9)
    cfg = dense_cfg(
        *(kind, T + "CONFIG_FILE", name, T + "OPTS", overrides),
        *(T + "WEIGHTS", saved(stock), "INPUT.FORMAT", student_format),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[x * 2 ** (i / 3) for i in range(3)] for x in SIDES]),
    )
    student, batch = attached(cfg), tiny_batch()
    losses, _ = train_losses(student, batch)
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0
    sum(losses.values()).backward()
    _, found = student.distiller.box.run_teacher(TeacherPass(student.teacher, batch))
    # detectron2's FCOS doesn't know its format: its config's data loader reads BGR.
    is_same_order = student_format == (getattr(stock, "input_format", None) or "BGR")
    theirs = [x if is_same_order else {**x, "image": x["image"].flip(0)} for x in batch]
    with torch.no_grad():
        features = stock.backbone(stock.preprocess_image(theirs).tensor)
        wanted = stock.head([features[f] for f in stock.head_in_features])
    for ours, other in zip(found, wanted):
        for a, b in zip(ours, other):
            assert (a - b).abs().max() <= 1e-6


SIDES = (32, 64, 128, 256, 512)


def test_a_mask_rcnn_of_the_zoo_teaches_masks_too(saved):
    name, overrides = SHRUNK["LSJ"]
    cfg = tiny_cfg(
        *(T + "CONFIG_FILE", name, T + "OPTS", overrides),
        *(T + "WEIGHTS", saved(stock_model(name, overrides))),
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
    )
    losses, _ = train_losses(attached(cfg), tiny_batch(masks=True))
    assert losses["loss_mask_kd"] > 0


def test_the_zoos_checkpoint_is_found_for_a_lazyconfig_name():
    cfg = tiny_cfg(T + "CONFIG_FILE", SHRUNK["LSJ"][0])
    assert load_teacher_config(cfg)[1].endswith(".pkl")


def test_class_names_come_from_the_data_sets_of_its_data_loader(saved):
    MetadataCatalog.get("lazy_test_set").thing_classes = ["a", "b", "c"]
    from detectron2.data import DatasetCatalog

    DatasetCatalog.register("lazy_test_set", lambda: [])
    name, overrides = SHRUNK["LSJ"]
    data = "dataloader.train.dataset.names=lazy_test_set"
    overrides = (*overrides, data)
    cfg = tiny_cfg(
        *(T + "CONFIG_FILE", name, T + "OPTS", overrides, T + "CLASS_MAP", ("names",)),
        *(T + "WEIGHTS", saved(stock_model(name, overrides))),
        *("DATASETS.TRAIN", ("lazy_test_set",)),
    )
    assert attached(cfg).distiller.box._class_map.is_identity


@pytest.mark.parametrize(
    "text, reason",
    [
        ("modle = dict(a=1)", "defines no `model`"),
        ("model = 3", "defines no `model`"),
        ("import no_such_package_here", "package 'no_such_package_here' is not installed"),
        ("raise RuntimeError('its own')", "running this LazyConfig file failed.*its own"),
        ("model = (", "SyntaxError"),
        ("model = dict(a=1)", "builds a DictConfig, which is no model"),
        ("model = dict(_target_='torch.nn.Linear', a=1)", "builds no model: TypeError"),
        ("model = dict(_target_='torch.nn.ReLU')", "is a ReLU; a two-stage student needs"),
    ],
)
def test_a_file_that_is_no_detector_is_one_error_with_the_key(text, reason, tmp_path):
    (tmp_path / "t.py").write_text(text)
    original = builtins.__import__
    cfg = tiny_cfg(T + "CONFIG_FILE", str(tmp_path / "t.py"), T + "WEIGHTS", "w.pth")
    with pytest.raises(ConfigError, match=f"(?s)TEACHER.CONFIG_FILE.*{reason}"):
        attached(cfg)
    assert builtins.__import__ is original


def test_a_missing_timm_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.layers", None)
    name, overrides = SHRUNK["ViTDet"]
    cfg = tiny_cfg(T + "CONFIG_FILE", name, T + "OPTS", overrides, T + "WEIGHTS", "w.pth")
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE.*'timm' is not installed.*extra"):
        attached(cfg)


@pytest.mark.parametrize(
    "override, reason",
    [
        ("model.no_such=3", "there is no model.no_such"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "no MODEL.ROI_HEADS"),
        ("model.roi_heads.num_classes=[", "override"),
    ],
)
def test_an_override_that_does_not_fit_names_its_key(override, reason):
    cfg = tiny_cfg(T + "CONFIG_FILE", SHRUNK["LSJ"][0], T + "OPTS", (override,))
    with pytest.raises(ConfigError, match=f"(?s)TEACHER.OPTS.*{reason}"):
        attached(cfg)


def test_a_lazyconfig_from_a_url_is_not_run():
    cfg = tiny_cfg(T + "CONFIG_FILE", "https://example.org/teacher.py", T + "WEIGHTS", "w.pth")
    with pytest.raises(ConfigError, match="is code"):
        attached(cfg)


def test_contradicting_channel_orders_are_refused():
    name, overrides = SHRUNK["LSJ"]
    opts = (*overrides, "model.input_format=RGB")
    cfg = tiny_cfg(T + "CONFIG_FILE", name, T + "OPTS", opts, T + "WEIGHTS", "w.pth")
    with pytest.raises(ConfigError, match="input_format is 'RGB'.*image_format 'BGR'"):
        attached(cfg)


def test_a_teacher_that_does_not_say_its_channel_order_is_refused_or_told(saved, caplog):
    # detectron2's FCOS; here without the data loader of its whole config.
    name = "common/models/fcos.py"
    cfg = dense_cfg("FCOS", T + "CONFIG_FILE", name, T + "WEIGHTS", "w.pth")
    with pytest.raises(ConfigError, match="fcos.py.*says the channel order of the images; set one"):
        attached(cfg)
    student, stock = build_model(dense_cfg("FCOS")), build_model(dense_cfg("FCOS", stock=True))
    stock.input_format = None
    attach_teacher(student, dense_cfg("FCOS", "INPUT.FORMAT", "RGB"), teacher=stock)
    assert "channel order of its images: it gets the student's, RGB" in caplog.text


def test_images_larger_than_a_square_padding_teachers_are_refused(saved):
    name, overrides = SHRUNK["ViTDet"]
    stock = stock_model(name, overrides)
    files = (T + "CONFIG_FILE", name, T + "OPTS", overrides, T + "WEIGHTS", saved(stock))
    with pytest.raises(ConfigError, match="INPUT.MAX_SIZE_TRAIN is 1333.*128 x 128"):
        attached(tiny_cfg(*files))
    student = attached(tiny_cfg(*files, "INPUT.MAX_SIZE_TRAIN", 128))
    batch = tiny_batch()
    batch[0]["image"] = torch.zeros(3, 64, 200, dtype=torch.uint8)
    message = r"INPUT.MAX_SIZE_TRAIN.*MAX_SIZE_TEST.*\(64, 200\).*128 x 128"
    with pytest.raises(ConfigError, match=message):
        train_losses(student, batch)
    # In evaluation detectron2 would crop it without a word.
    student.eval()
    with pytest.raises(ConfigError, match=message):
        evaluate_teacher(tiny_cfg(), student, lambda cfg, model: model(batch))
    student.distiller = None  # nothing else looks at the image
    with pytest.raises(ConfigError, match=message):
        predict_all(student, batch)


def test_a_yaml_teacher_still_is_what_it_was(tmp_path, saved):
    teacher = tiny_model(tiny_cfg(architecture="GeneralizedRCNN"), seed=7)
    (tmp_path / "t.yaml").write_text(tiny_cfg(architecture="GeneralizedRCNN").dump())
    files = (T + "CONFIG_FILE", str(tmp_path / "t.yaml"), T + "WEIGHTS", saved(teacher))
    assert attached(tiny_cfg(*files)).teacher.input_format == "BGR"


def test_it_is_evaluated_on_the_students_device(tmp_path, saved):
    """A LazyConfig's model has no MODEL.DEVICE of its own; detectron2's default is a GPU."""
    path = tmp_path / "teacher.py"
    lines = "from detectron2.config import LazyCall as L", "from helpers import tiny_model"
    path.write_text("\n".join((*lines, "model = L(tiny_model)(seed=2)")))
    weights = saved(tiny_model(seed=2))
    cfg = tiny_cfg(T + "CONFIG_FILE", str(path), T + "WEIGHTS", weights, "DATASETS.TEST", ())
    seen = []

    def test(cfg, model):
        seen.append(cfg.MODEL.DEVICE)
        return CrossKDTrainer.test(cfg, model)

    assert evaluate_teacher(cfg, attached(cfg), test) == {} and seen == ["cpu"]
