"""The average of the weights, the best weights, a better student's warning, Weights & Biases; each
in whole runs on a handful of pictures."""

import gc
import logging
import shutil
import sys
import types

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_cfg, tiny_model
from test_train_net import TRAINABLE, files, metrics, run, write_config  # noqa: F401

from crosskd_ifc import ConfigError, CrossKDTrainer, Teacher
from crosskd_ifc.training.averaging import WeightAverage
from crosskd_ifc.training.best import BestWeights
from crosskd_ifc.training.checkpointer import CheckpointError, SafeCheckpointer
from crosskd_ifc.training.preflight import check_best_metric, check_training_config
from crosskd_ifc.training.schedule import TeacherEvaluation
from crosskd_ifc.training.wandb_writer import WandbWriter
from crosskd_ifc.weights.export import export_student

EMA = ("SOLVER.EMA_DECAY", 0.75)


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Evaluations(list):
    """(folder, AP) of each evaluation of the runs within a context."""

    def __enter__(self):
        self._test = test = CrossKDTrainer.__dict__["test"]

        def spy(cls, cfg, model, evaluators=None):
            self.append((cfg.OUTPUT_DIR, test.__func__(cls, cfg, model, evaluators)["bbox"]["AP"]))
            return {"bbox": {"AP": self[-1][1]}}

        CrossKDTrainer.test = classmethod(spy)
        return self

    def __exit__(self, *_):
        CrossKDTrainer.test = self._test


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):  # noqa: F811
    """(config, folder, evaluations) of a distilled run of 4 steps with an average."""
    folder = tmp_path_factory.mktemp("whole")
    learned = ("MODEL.CROSSKD.FUSION.NAME", "attention", "TEST.BEST_METRIC", "ema/bbox/AP")
    opts = (*EMA, *learned, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1)
    opts += ("MODEL.CROSSKD.DIAGNOSTICS.GRAD_NORM", True)
    config, out = write_config(files, folder, *opts)
    with Evaluations() as found:
        run(config)
    return config, out, found


def averages(out):
    """The average after each step, from the weights in the checkpoints."""
    found = []
    for name in [f"model_{i:07d}" for i in range(3)] + ["model_final"]:
        weights = load(out / f"{name}.pth")["model"]
        old = found[-1] if found else weights
        is_mean = {k: v.is_floating_point() for k, v in weights.items()}
        found.append({k: 0.75 * old[k] + 0.25 * v if is_mean[k] else v for k, v in weights.items()})
    return found


@pytest.mark.parametrize("decay", [0.9, 0.9995, 0.9999])
def test_whole_numbers_such_as_the_indices_of_a_swin_transformer_are_no_means(decay):
    model = torch.nn.Linear(1, 1)
    model.register_buffer("relative_position_index", torch.arange(600))
    hook = WeightAverage(model, decay)
    hook.trainer = types.SimpleNamespace(model=model)
    for _ in range(3):
        hook.after_step()
    assert torch.equal(hook.weights()["relative_position_index"], torch.arange(600))


def test_the_average_is_that_of_the_weights_after_each_step(whole):
    _, out, _ = whole
    average, expected = load(out / "model_final_ema.pth")["model"], averages(out)[-1]
    for name, value in average.items():
        torch.testing.assert_close(value, expected[name])
    weights = load(out / "model_final.pth")["model"]
    changed = [n for n in average if not torch.equal(average[n], weights[n])]
    assert any("running_mean" in n for n in changed) and any("box_head" in n for n in changed)
    assert {n for n in weights if n not in average} == {n for n in weights if "fusion." in n}


def test_it_is_evaluated_and_loads_in_stock_detectron2_and_exports(whole, tmp_path):
    config, out, evaluations = whole
    assert all(x["crosskd/grad_norm"] > 0 for x in metrics(out) if "total_loss" in x)
    average = out / "model_final_ema.pth"
    model = build_model(tiny_cfg(*TRAINABLE, architecture="GeneralizedRCNN"))
    model.load_state_dict(load(average)["model"])
    folders = [folder for folder, _ in evaluations]
    assert folders == [str(out), str(out / "ema")] * 4
    assert metrics(out)[-1]["ema/bbox/AP"] == evaluations[-1][1]
    results = run(
        config, "--eval-only", "MODEL.WEIGHTS", average, "OUTPUT_DIR", tmp_path / "evaluated"
    )
    assert results["bbox"]["AP"] == evaluations[-1][1]
    name = "inference/coco_instances_results.json"
    assert (out / "ema" / name).read_text() == (tmp_path / "evaluated" / name).read_text()
    assert export_student(str(average), str(tmp_path / "deployed")).detections > 0


def test_the_best_average_is_kept(whole):
    _, out, evaluations = whole
    scores = [score for _, score in evaluations[1::2]]
    best, last = load(out / "model_best.pth"), scores.index(max(scores))
    assert best["best"]["metric"] == "ema/bbox/AP" and best["best"]["value"] == max(scores) > 0
    assert best["iteration"] == last
    expected = averages(out)[last]
    for name, value in best["model"].items():
        torch.testing.assert_close(value, expected[name])


def test_a_resumed_run_has_the_same_average_and_remembers_the_best(whole, tmp_path):
    config, out, _ = whole
    shutil.copy(out / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    best = load(out / "model_best.pth")
    best["best"]["value"] = 101.0
    torch.save(best, tmp_path / "model_best.pth")
    run(config, "--resume", "OUTPUT_DIR", tmp_path)
    for name in ("model_final", "model_final_ema"):
        assert_same(load(tmp_path / f"{name}.pth")["model"], load(out / f"{name}.pth")["model"])
    hooks = [load(x / "model_final.pth")["trainer"]["hooks"] for x in (tmp_path, out)]
    assert_same(*(x["WeightAverage"] for x in hooks))
    assert hooks[0]["WeightAverage"]["n_averaged"] == 4
    assert load(tmp_path / "model_best.pth")["best"]["value"] == 101.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_the_best_of_another_metric_is_not_compared(tmp_path):
    best = {"metric": "bbox/AP", "value": 3.0, "iteration": 7}
    torch.save({"model": {"x": torch.ones(1)}, "best": best}, tmp_path / "model_best.pth")
    for metric, expected in (("bbox/AP", 3.0), ("bbox/AP50", None)):
        writer = SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
        hook = BestWeights(1, writer, metric, dict)
        hook.trainer = types.SimpleNamespace(start_iter=8)
        hook.before_train()
        assert hook.best_metric == expected


def test_nor_is_the_best_on_other_test_data(tmp_path, caplog):
    best = {"metric": "bbox/AP", "value": 3.0, "iteration": 7, "tested_on": ["a", 800]}
    torch.save({"model": {"x": torch.ones(1)}, "best": best}, tmp_path / "model_best.pth")
    for data, expected in ((("a", 800), 3.0), (("b", 800), None), (("a", 600), None)):
        writer = SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
        hook = BestWeights(1, writer, "bbox/AP", dict, data)
        hook.trainer = types.SimpleNamespace(start_iter=8)
        hook.before_train()
        assert hook.best_metric == expected
        assert ("was best on ['a', 800]" in caplog.text) == (expected is None)


def test_a_run_without_an_average_is_the_same_and_cannot_go_on_with_one(whole, tmp_path):
    config, out, _ = whole
    plain = ("SOLVER.EMA_DECAY", 0.0, "TEST.BEST_METRIC", "bbox/AP", "OUTPUT_DIR", tmp_path)
    with Evaluations() as found:
        run(config, *plain, "MODEL.CROSSKD.TEACHER.EVAL_AT_START", True)
    assert_same(load(tmp_path / "model_final.pth")["model"], load(out / "model_final.pth")["model"])
    assert not list(tmp_path.glob("*_ema.pth"))
    # The teacher first; a student with random predictors is not evaluated at the start.
    assert [folder for folder, _ in found] == [str(tmp_path / "teacher")] + 4 * [str(tmp_path)]
    scores = [score for _, score in found[1:]]
    best, last = load(tmp_path / "model_best.pth"), scores.index(max(scores))
    assert best["best"]["value"] == max(scores) and best["iteration"] == last
    name = "model_final" if last == 3 else f"model_{last:07d}"
    assert_same(best["model"], load(tmp_path / f"{name}.pth")["model"])
    with pytest.raises(CheckpointError, match="WeightAverage(?s:.*)SOLVER.EMA_DECAY"):
        run(config, "--resume", *plain, *EMA)


def test_the_average_never_holds_the_teacher():
    student, _ = distilling()
    teacher = student.teacher
    average = WeightAverage(student, 0.9)
    assert student.teacher is teacher and student.distiller is not None
    seen, todo = set(), [average]
    while todo:
        x = todo.pop()
        if (
            id(x) in seen
            or isinstance(x, (type, type(gc)))
            or callable(x)
            and not hasattr(x, "parameters")
        ):
            continue
        seen.add(id(x))
        assert not isinstance(x, Teacher) and x is not teacher.model
        todo += gc.get_referents(x)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (student, average._average)]
    assert sizes[0] == sizes[1] > 0


def test_a_metric_that_no_evaluation_gives_is_refused():
    def cfg(metric, *opts, sets=("a",)):
        opts = ("TEST.BEST_METRIC", metric, "TEST.EVAL_PERIOD", 2, "DATASETS.TEST", sets, *opts)
        return tiny_cfg(*opts, "MODEL.CROSSKD.ENABLED", False)

    for good in (
        cfg("bbox/AP"),
        cfg("b/bbox/AP75", sets=("a", "b")),
        cfg("ema/bbox/AP50"),
        cfg(""),
    ):
        check_best_metric(good)
    check_best_metric(cfg("segm/AP", "MODEL.MASK_ON", True))
    MetadataCatalog.get("coco").set(thing_classes=["a/b", "c"])
    MetadataCatalog.get("voc").set(thing_classes=["c"], evaluator_type="pascal_voc")
    MetadataCatalog.get("one").set(thing_classes=["c"])
    coco, voc = {"sets": ("coco",)}, {"sets": ("voc",)}
    for good in (
        cfg("bbox/APs", **coco),
        cfg("bbox/AP-a/b", **coco),
        cfg("bbox/AP-unknown"),
        cfg("bbox/AP75", **voc),
    ):
        check_best_metric(good)
    for bad in (
        *(cfg(f"bbox/{x}", **coco) for x in ("AP60", "APx", "AP50s", "AP-d", "AP/AP", "AP-")),
        *(cfg(f"bbox/{x}", **voc) for x in ("APs", "AP-c")),
        cfg("bbox/AP-c", sets=("one",)),
        cfg("segm/AP", "MODEL.MASK_ON", True, **voc),
        cfg("keypoints/APs", "MODEL.KEYPOINT_ON", True),
    ):
        with pytest.raises(ConfigError, match="TEST.BEST_METRIC is .*; expected bbox/AP"):
            check_best_metric(bad)
    with pytest.raises(ConfigError, match="TEST.BEST_METRIC is 'AP'; expected bbox/AP"):
        check_best_metric(cfg("AP"))
    with pytest.raises(ConfigError, match="the last part may be AP, AP50, .*, AP-CLASS"):
        check_best_metric(cfg("bbox/AP-d", **coco))
    with pytest.raises(ConfigError, match="expected a/bbox/AP or b/bbox/AP"):
        check_best_metric(cfg("bbox/AP", sets=("a", "b")))
    with pytest.raises(ConfigError, match="TEST.BEST_METRIC.*'segm/AP'; expected bbox/AP"):
        check_best_metric(cfg("segm/AP"))
    for bad, told in (
        (cfg("bbox/AP", "TEST.EVAL_PERIOD", 0), "set TEST.EVAL_PERIOD"),
        (cfg("ema/bbox/AP"), "needs SOLVER.EMA_DECAY"),
        (cfg("", "SOLVER.EMA_DECAY", 1.0), "SOLVER.EMA_DECAY is 1.0"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_training_config(bad)


def test_a_student_better_than_its_teacher_is_told_once():
    hook, told = TeacherEvaluation(), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("crosskd_ifc.training.schedule")
    logger.addHandler(handler)
    hook.load_state_dict({"teachers": {"teacher": {"bbox/AP": 30.0}}, "told": []})
    hook._compare({"bbox/AP": 29.0}, "now")
    assert told == [] and not hook.state_dict()["told"]
    hook._compare({"bbox/AP": 31.0}, "after 9 iterations")
    hook._compare({"bbox/AP": 32.0}, "later")
    logger.removeHandler(handler)
    assert len(told) == 1 and "better than its teacher after 9 iterations" in told[0]
    assert "bbox/AP 31.00" in told[0] and "30.00" in told[0] and "TEACHER" in told[0]
    assert hook.state_dict()["told"] == ["teacher"]


def test_so_is_one_that_starts_from_better_weights(files, tmp_path):  # noqa: F811
    config, out = write_config(files, tmp_path, "MODEL.CROSSKD.TEACHER.EVAL_AT_START", True)
    start = tiny_model(tiny_cfg(*TRAINABLE), seed=7)
    DetectionCheckpointer(start, str(tmp_path)).save("start")
    worse = ("MODEL.CROSSKD.TEACHER.OPTS", ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9))
    run(config, "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", tmp_path / "start.pth", *worse)
    log = (out / "log.txt").read_text()
    assert log.count("The student is better than its teacher at the start") == 1
    held = load(out / "model_final.pth")["trainer"]["hooks"]["TeacherEvaluation"]
    teacher = next(x["teacher/bbox/AP"] for x in metrics(out) if "teacher/bbox/AP" in x)
    assert held["told"] == ["teacher"] and held["teachers"]["teacher"]["bbox/AP"] == teacher


def test_scalars_go_to_weights_and_biases_offline(files, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config, out = write_config(files, tmp_path, "WANDB.PROJECT", "shapes")
    run(config, "SOLVER.MAX_ITER", 2)
    first = (out / "wandb_id").read_text()
    assert list(out.glob(f"wandb/offline-run-*-{first}/run-{first}.wandb"))
    run(config, "--resume")
    assert (out / "wandb_id").read_text() == first
    found = list(out.glob("wandb/offline-run-*"))
    assert all(x.name.endswith(first) for x in found)
    assert any(b"total_loss" in x.read_bytes() for x in out.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("mode, resume", [(None, None), ("online", "allow")])
def test_a_resumed_run_goes_on_online_and_does_not_replace_what_is_there(
    tmp_path, monkeypatch, mode, resume
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    starts = []
    run = types.SimpleNamespace(log=lambda *_, **__: None)
    service = types.SimpleNamespace(init=lambda **options: starts.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", service)
    for start in (0, 5):
        with EventStorage(start):
            WandbWriter(tiny_cfg("OUTPUT_DIR", str(tmp_path))).write()
    first, second = starts
    assert first["id"] == second["id"] and second["resume"] == first["resume"] == resume


def test_without_the_package_it_is_one_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = tiny_cfg("WANDB.PROJECT", "shapes", "MODEL.CROSSKD.ENABLED", False)
    with pytest.raises(ConfigError, match="WANDB.PROJECT is 'shapes'.*pip install wandb"):
        check_training_config(cfg)
