"""tools/lazyconfig_train_net.py from end to end, on a few pictures of the built-in kind."""

import collections
import glob
import itertools
import os
import re
import signal

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads
from detectron2.solver import LRMultiplier, build_lr_scheduler
from helpers import load_tool
from test_quick_configs import few_pictures, pictures, teachers  # noqa: F401  fixtures
from test_train_net import ROOT, metrics

from crosskd_ifc import ConfigError, CrossKDTrainer, attach_teacher
from crosskd_ifc.common.lazy_config import load_lazy_config
from crosskd_ifc.experiments.runs import Run
from crosskd_ifc.modeling.attach import load_teacher_config
from crosskd_ifc.training.errors import SetupError
from crosskd_ifc.training.launching import argument_parser
from crosskd_ifc.training.lazy_trainer import LazyStream
from crosskd_ifc.weights.export import export_student

tool = load_tool("lazyconfig_train_net")
TEACHER = "quick/faster_rcnn_R_34_shapes.yaml"
STUDENT = "quick/crosskd_ifc_R_18_shapes.py"
SMALL = (
    *("dataloader.train.total_batch_size=2", "train.max_iter=4", "train.eval_period=0"),
    *("train.checkpointer.period=2", "optimizer.lr=0.001", "train.log_period=1"),
    *("lr_multiplier.warmup_length=0", "lr_multiplier.scheduler.values=[1.0]"),
    "lr_multiplier.scheduler.milestones=[]",
)
# The same in YAML.
SMALL_YAML = (
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 0),
    *("SOLVER.BASE_LR", 0.001, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", ()),
)


OWN_LOADER = """
from crosskd_ifc.common.lazy_config import load_lazy_config
from detectron2.config import LazyCall as L

file = "{quick}/quick/faster_rcnn_vit_shapes.py"
config = load_lazy_config(file, key="config.py")
model, train, optimizer = config.model, config.train, config.optimizer
lr_multiplier, dataloader = config.lr_multiplier, config.dataloader
loader = dataloader.train
loader.total_batch_size = 2
dataloader.train = L(lambda inner: inner)(inner=loader)
"""


def run(config, *words, main=tool.main):
    return main(argument_parser().parse_args(["--config-file", config, *map(str, words)]))


def model_of(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def opts(few_pictures, teachers, tmp_path):  # noqa: F811
    """Overrides of the student's config; the last one is its folder."""
    weights = f"crosskd.TEACHER.WEIGHTS={teachers(TEACHER)}"
    return [*SMALL, weights, f"train.output_dir={tmp_path / 'run'}"]


def test_a_lazyconfig_trains_as_its_yaml_twin_bit_for_bit_also_when_it_was_stopped(
    opts, teachers, tmp_path, monkeypatch  # noqa: F811
):
    step = CrossKDTrainer.run_step

    def with_sigterm(self):
        step(self)
        if self.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(CrossKDTrainer, "run_step", with_sigterm)
        with pytest.raises(SystemExit) as stopped:
            run(STUDENT, *opts)
    assert stopped.value.code == 143
    with pytest.raises(ConfigError, match="train.output_dir .* holds checkpoints.*--resume"):
        run(STUDENT, *opts)
    run(STUDENT, "--resume", *opts)
    out = tmp_path / "run"
    assert [x["iteration"] for x in metrics(out) if "total_loss" in x][-1] == 3
    assert "loss_cls_kd" in metrics(out)[0] and "bbox/AP" in metrics(out)[-1]

    yaml_opts = ["OUTPUT_DIR", tmp_path / "yaml", "MODEL.CROSSKD.TEACHER.WEIGHTS"]
    yaml_opts = [*SMALL_YAML, *yaml_opts, teachers(TEACHER)]
    run(STUDENT.replace(".py", ".yaml"), *yaml_opts, main=load_tool("train_net").main)
    assert is_same(model_of(out), model_of(tmp_path / "yaml"))

    # It is evaluated, without a teacher, and loads as it is in stock classes.
    weights = f"train.init_checkpoint={out / 'model_final.pth'}"
    without = ["crosskd.TEACHER.WEIGHTS=gone.pth", f"train.output_dir={tmp_path / 'eval'}"]
    results = run(STUDENT, "--eval-only", *opts, *without, weights)
    assert results["bbox"]["AP"] == pytest.approx(metrics(out)[-1]["bbox/AP"], nan_ok=True)
    model = load_lazy_config(os.path.join(ROOT, "configs", STUDENT), key="test").model
    model._target_, model.roi_heads._target_ = GeneralizedRCNN, StandardROIHeads
    instantiate(model).load_state_dict(model_of(out))
    with pytest.raises(ConfigError, match="model_final.pth.*lazyconfig_train_net.*--config-file"):
        export_student(str(out / "model_final.pth"), str(tmp_path / "exported"))


def test_an_image_without_a_usable_box_is_left_out_as_by_the_yaml_twin(few_pictures):  # noqa: F811
    node = load_lazy_config(os.path.join(ROOT, "configs", STUDENT), key="test").dataloader.train
    dataset = instantiate(node.dataset)
    lost = {**dataset[0], "annotations": [{**dataset[0]["annotations"][0], "bbox": [5, 5, 0, 9]}]}
    cfg = Run("", STUDENT.replace(".py", ".yaml"), "", []).cfg()
    counts = []
    for node.dataset.filter_empty in (True, False):
        counts.append(len(LazyStream(cfg, node, [lost, *dataset[1:]]).records))
    assert counts == [len(dataset) - 1, len(dataset)]


def sizes_alone():
    return lambda record: {key: record[key] for key in ("image_id", "width", "height")}


def first_image():
    return lambda batch: batch[0]["image_id"]


def test_a_sampler_of_a_lazyconfig_counts_all_its_images(few_pictures):  # noqa: F811
    node = load_lazy_config(os.path.join(ROOT, "configs", STUDENT), key="test").dataloader.train
    dataset = instantiate(node.dataset)
    lost = {**dataset[0], "annotations": [{**dataset[0]["annotations"][0], "bbox": [5, 5, 0, 9]}]}
    dataset = [lost, *dataset[1:]]
    factors = torch.ones(len(dataset))
    factors[-1] = 10  # the last image
    node.sampler = L(RepeatFactorTrainingSampler)(repeat_factors=factors)
    node.mapper, node.collate_fn = L(sizes_alone)(), L(first_image)()
    node.total_batch_size, node.num_workers = 1, 0
    cfg = Run("", STUDENT.replace(".py", ".yaml"), "", []).cfg()
    stream = LazyStream(cfg, node, dataset)
    assert len(stream.records) == len(dataset)
    drawn = collections.Counter(itertools.islice(iter(stream.build_loader()), 10 * len(dataset)))
    assert drawn.most_common(1)[0][0] == dataset[-1]["image_id"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["train.max_itr=3"], "there is no train.max_itr"),
        (["train.max_iter=0"], "^train.max_iter is 0"),
        (["train.max_iter=soon"], "soon.*train.max_iter"),
        (["train.device=cuda"], "^train.device is 'cuda'.*add train.device=cpu"),
        (["train.amp.enabled=true"], "^train.amp.enabled True needs a GPU"),
        (["train.init_checkpoint=gone.pth"], "^train.init_checkpoint: there is no file 'gone.pth'"),
        (["model.roi_heads.num_classes=3"], "^model.roi_heads.num_classes is 3.*8 classes"),
        (["dataloader.train.dataset.names=no_data"], "^dataloader.train.dataset.names: no data"),
        (["crosskd.TEACHER.WEIGHTS=gone.pth"], "^crosskd.TEACHER.WEIGHTS: there is no file"),
        (
            ["crosskd.TEACHER.CONFIG_FILE="],
            "^crosskd.TEACHER.CONFIG_FILE is empty, but CrossKDRCNN",
        ),
        (["crosskd.FUSION.NAME=no_such"], "^crosskd.FUSION.NAME is 'no_such'"),
        (["+crosskd.FUSION.NAMES=mean"], "settings of the distillation: .*NAMES"),
        (["crosskd.FUSION.IN_FEATURES=[fc9]"], "^crosskd.FUSION.IN_FEATURES.*no layer 'fc9'"),
        (["model._target_=detectron2.modeling.GeneralizedRCNN"], "^model._target_ is 'Generalized"),
        (["+optimizer.speed=3"], "^the run can't start: .*unexpected keyword argument 'speed'"),
        (["--eval-only"], "^train.init_checkpoint is empty"),
    ],
)
def test_a_mistake_is_one_line_with_the_lazy_path(opts, words, message):
    with pytest.raises((ConfigError, SetupError), match=f"(?s){message}"):
        run(STUDENT, *[w for w in words if w[0] == "-"], *opts, *[w for w in words if w[0] != "-"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = dict(a=1)", "defines no `dataloader.train`"),
        ("modle = dict(a=1)", "defines no `model`"),
        ("import no_such_package_here", "package 'no_such_package_here' is not installed"),
    ],
)
def test_a_file_that_is_no_run_is_refused(text, message, tmp_path):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError, match=f"--config-file .*{message}"):
        run(str(tmp_path / "config.py"))


@pytest.mark.parametrize("there, missing", [("test", "evaluator"), ("evaluator", "test")])
def test_without_test_data_or_evaluator_nothing_can_be_evaluated(there, missing, tmp_path):
    nodes = {"lr_multiplier": {}, "optimizer": {}}
    nodes["train"] = {"device": "cpu", "output_dir": str(tmp_path / "out")}
    nodes["model"] = {"_target_": "detectron2.modeling.GeneralizedRCNN"}
    nodes["dataloader"] = {"train": {}, there: {}}
    lines = [f"{name} = {node}" for name, node in nodes.items()]
    (tmp_path / "config.py").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"dataloader.{missing} is missing: there is nothing to"):
        run(str(tmp_path / "config.py"), "--eval-only")


def test_a_yaml_config_is_sent_to_the_other_tool():
    with pytest.raises(ConfigError, match="--config-file is .*tools/train_net.py takes YAML"):
        run(STUDENT.replace(".py", ".yaml"))


COCO = glob.glob(os.path.join(ROOT, "configs", "COCO-*", "*.py"))


@pytest.mark.parametrize("config", COCO, ids=map(os.path.basename, COCO))
def test_an_example_for_coco_is_a_run_whose_student_and_teacher_fit(config, tmp_path):
    assert "coco_2017_train" in DatasetCatalog
    words = ["--config-file", config, "train.device=cpu", f"train.output_dir={tmp_path}"]
    config, cfg = tool.setup(argument_parser().parse_args(words))
    teacher, weights = load_teacher_config(cfg)
    assert weights.startswith("https://")
    student = instantiate(config.model)
    attach_teacher(student, cfg, teacher=instantiate(teacher.model))
    assert student.distiller is not None


def test_the_learning_rate_is_that_of_the_yaml_twin_in_every_step():
    config = load_lazy_config(os.path.join(ROOT, "configs", STUDENT), key="test")
    cfg = Run("", STUDENT.replace(".py", ".yaml"), "").cfg()
    rates = []
    for make in (
        lambda optimizer: build_lr_scheduler(cfg, optimizer),
        lambda optimizer: LRMultiplier(optimizer, instantiate(config.lr_multiplier), 220),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        scheduler, found = make(optimizer), []
        for _ in range(220):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        rates.append(found)
    assert rates[0] == rates[1] and config.optimizer.lr == cfg.SOLVER.BASE_LR
    assert config.train.max_iter == cfg.SOLVER.MAX_ITER == 220


def test_a_stock_model_trains_without_a_teacher_on_a_loader_of_its_own(
    few_pictures, tmp_path  # noqa: F811
):
    (tmp_path / "config.py").write_text(OWN_LOADER.format(quick=os.path.join(ROOT, "configs")))
    out = tmp_path / "run"
    run(str(tmp_path / "config.py"), f"train.output_dir={out}", *SMALL[2:4], "train.max_iter=1")
    assert "dataloader.train is no build_detection_train_loader" in (out / "log.txt").read_text()
    found = {key for line in metrics(out) for key in line}
    assert "loss_cls" in found and "bbox/AP" in found and "loss_cls_kd" not in found


def test_a_resumed_run_has_its_own_optimizer_settings_and_keeps_few_checkpoints(
    few_pictures, tmp_path  # noqa: F811
):
    text = OWN_LOADER.format(quick=os.path.join(ROOT, "configs"))
    text += """
from detectron2 import model_zoo
optimizer = model_zoo.get_config("common/optim.py").AdamW
"""
    (tmp_path / "config.py").write_text(text)
    words = (str(tmp_path / "config.py"), *SMALL[2:3], *SMALL[4:], "train.checkpointer.period=1")
    words += ("train.checkpointer.max_to_keep=1", f"train.output_dir={tmp_path / 'run'}")
    run(*words, "train.max_iter=1", "+optimizer.betas=[0.8,0.99]")
    new = ("optimizer.lr=0.01", "+optimizer.betas=[0.7,0.99]", "optimizer.weight_decay=0.3")
    run(words[0], "--resume", *words[1:], "train.max_iter=2", *new)
    assert len(list((tmp_path / "run").glob("model_0*.pth"))) == 1  # max_to_keep
    state = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["trainer"]
    group = state["_trainer"]["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.3 and list(group["betas"]) == [0.7, 0.99]
    assert [x["lr"] for x in metrics(tmp_path / "run") if "lr" in x] == [0.001, 0.01]
    log = (tmp_path / "run" / "log.txt").read_text()
    for row in (
        r"weight_decay +0.1 +0.3",
        r"betas +\(0.8, 0.99\) +\(0.7, 0.99\)",
        r"lr +0.001 +0.01",
    ):
        assert re.search(rf"optimizer.{row}\n", log)
