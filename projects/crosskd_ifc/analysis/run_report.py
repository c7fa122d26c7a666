"""One HTML page about one training."""

import math
import os
import tempfile
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model

from ..common.environment import hardware, versions
from ..common.files import claim_output, replacing
from ..config import distillation_requested, teacher_configs
from ..data.class_names import class_names_or_numbers
from ..modeling.attach import attach_teacher
from ..modeling.classes import build_class_map
from ..modeling.summary import count_parameters, describe_distillation
from ..training.preflight import check_evaluation_config
from ..training.schedule import evaluate_teacher
from ..training.trainer import CrossKDTrainer
from ..weights.strict import load_strictly
from . import pictures
from .detections import COLUMNS, draw_row, predict_all, spread_evenly
from .html_page import Page, escape, paragraph, picture, picture_row, svg, table
from .run_figures import draw_evaluations, draw_losses, draw_statistics
from .run_record import RunRecord
from .worst_images import Errors, errors_of, rank_images


class Networks:
    """The trained student, with its teacher if it distils, ready to detect."""

    def __init__(self, record: RunRecord, device: str):
        """
        Raises:
            ConfigError: if a network can't be built or loaded.
        """
        cfg = record.cfg.clone()
        cfg.MODEL.DEVICE = device
        cfg.MODEL.WEIGHTS = record.weights()
        self.cfg = cfg
        check_evaluation_config(cfg)
        self.distils = distillation_requested(cfg)
        self.student = build_model(cfg)
        self.teacher = attach_teacher(self.student, cfg) if self.distils else None
        load_strictly(self.student, cfg.MODEL.WEIGHTS)
        self.student.eval()

    def names(self) -> Dict[str, Sequence[str]]:
        """Column of the pictures -> class names."""
        if self.teacher is not None:
            return pictures.names_by_column(self.cfg, self.teacher)
        return dict.fromkeys(COLUMNS, class_names_or_numbers(self.cfg))


def write_run_report(
    folder: str,
    out: str,
    *,
    config_file: str = "",
    with_models: bool = True,
    with_teacher: bool = False,
    images: int = 100,
    shown: int = 6,
    threshold: float = 0.5,
    device: str = "cpu",
    force: bool = False,
) -> str:
    """Write the page.

    Args:
        folder: the training's OUTPUT_DIR.
        out: the HTML file.
        config_file: instead of the ``config.yaml`` in ``folder``.
        with_models: look for the worst images, which needs weights, teacher and test data.
        with_teacher: evaluate the teacher on the test set if the training hasn't.
        images: how many of the test set are searched for the worst, evenly spread.
        shown: how many of them are drawn.
        threshold: lowest score that counts as a detection.
        device: that the models run on.
        force: replace ``out``.

    Returns:
        ``out``.

    Raises:
        ConfigError: if the folder is no training's, something that it needs is missing, or ``out``
            exists.
    """
    record = RunRecord(folder, config_file)
    claim_output(out, force=force, option="--output")
    networks = Networks(record, device) if with_models else None
    teacher = _teacher_results(record, networks if with_teacher else None)
    page = Page(_title(record), _subtitle(record))
    page.add_numbers(_headline(record, teacher))
    _add_curves(page, record, teacher)
    _add_classes(page, record, teacher)
    if networks is not None:
        _add_worst(page, networks, images, shown, threshold)
    _add_cost(page, record, networks)
    _add_settings(page, record, networks)
    with replacing(out) as f:
        f.write(page.html().encode())
    return out


def _teacher_results(record: RunRecord, networks: Optional[Networks]) -> Dict[str, float]:
    """ "bbox/AP", "bbox/AP-cat", ... of the teacher on the first test set: from the log, or
    measured now."""
    prefix = f"teacher/{record.test_prefix}"
    keys = [key for key in record.keys() if key.startswith(prefix)]
    found = {key[len(prefix) :]: record.last(key) for key in keys}
    found = {key: value for key, value in found.items() if value is not None}
    if found or networks is None or not networks.distils:
        return found
    cfg = networks.cfg.clone()
    cfg.DATASETS.TEST = cfg.DATASETS.TEST[:1]
    _, one = teacher_configs(cfg)[0]
    one.MODEL.CROSSKD.TEACHER.EVAL_AT_START = True
    build_class_map(one, networks.student, networks.teacher)  # are its classes ours?
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:  # the run's own stays as it is
        results = evaluate_teacher(cfg, networks.student, CrossKDTrainer.test)
    return {k: float(v) for k, v in flatten_results_dict(results).items() if math.isfinite(v)}


def _title(record: RunRecord) -> str:
    return os.path.basename(os.path.abspath(record.folder))


def _subtitle(record: RunRecord) -> str:
    cfg = record.cfg
    what = cfg.MODEL.META_ARCHITECTURE
    if distillation_requested(cfg):
        teachers = [one.MODEL.CROSSKD.TEACHER.CONFIG_FILE for _, one in teacher_configs(cfg)]
        what += f", distilled from {', '.join(teachers)}"
    data = f"trained on {', '.join(cfg.DATASETS.TRAIN)}"
    if cfg.DATASETS.TEST:
        data += f", tested on {', '.join(cfg.DATASETS.TEST)}"
    return escape(f"{what}; {data}; {os.path.abspath(record.folder)}")


def _headline(record: RunRecord, teacher: Dict[str, float]) -> List[Sequence[str]]:
    found: List[Sequence[str]] = []
    for task in record.tasks():
        points = record.evaluations(task)
        if points:
            found.append((f"{points[-1][1]:.1f}", f"AP ({task}), student"))
        if f"{task}/AP" in teacher:
            found.append((f"{teacher[f'{task}/AP']:.1f}", f"AP ({task}), teacher"))
    found.append((f"{record.iterations}", f"of {record.cfg.SOLVER.MAX_ITER} iterations"))
    seconds = record.median("time")
    if seconds is not None:
        found.append((f"{seconds:.2f} s", "an iteration, median"))
    agreement = record.last("crosskd/agreement_student")
    if agreement is not None:
        found.append((f"{agreement:.0%}", "student's and teacher's class agree"))
    return found


def _add_curves(page: Page, record: RunRecord, teacher: Dict[str, float]) -> None:
    aps = {task: teacher.get(f"{task}/AP") for task in record.tasks()}
    curve = draw_evaluations(record, aps)
    nothing = "There was no evaluation yet: TEST.EVAL_PERIOD says how often, and the end has one."
    page.add("Evaluation", svg(curve, "AP over the training") if curve else paragraph(nothing))
    note = "As they enter the sum: with their weights and the schedule's factor."
    page.add("Losses", svg(draw_losses(record), "losses"), paragraph(note, note=True))
    statistics = draw_statistics(record)
    if statistics:
        note = (
            "On the training images. Agreement: share of RoIs (dense detectors: weighted by the "
            "teacher's confidence) whose most probable class is the teacher's."
        )
        drawn = svg(statistics, "statistics of the distillation")
        page.add("Distillation", drawn, paragraph(note, note=True))


def _add_classes(page: Page, record: RunRecord, teacher: Dict[str, float]) -> None:
    for task in record.tasks():
        ours = record.per_class(task)
        start = f"{task}/AP-"
        theirs = {k[len(start) :]: v for k, v in teacher.items() if k.startswith(start)}
        if not ours:
            page.add(f"Classes ({task})", paragraph("The evaluator gives no AP by class."))
            continue
        rows = []
        for name in sorted(ours, key=lambda n: (math.isnan(ours[n]), ours[n])):
            both = ((ours[name], "ours"), (theirs.get(name, math.nan), "theirs"))
            bars = "".join(
                f'<div class="bar {kind}" style="width:{max(value, 0.5):.1f}%"></div>'
                for value, kind in both
                if not math.isnan(value)
            )
            values = "".join(f"<td class=right>{_number(value)}</td>" for value, _ in both)
            rows.append(f"<tr><td>{escape(name)}</td>{values}<td class=bars>{bars}</td></tr>")
        head = "<tr><th>class</th><th class=right>student</th><th class=right>teacher</th><th></th>"
        note = "Last evaluation, the weakest class first; the longest bar would be an AP of 100."
        if distillation_requested(record.cfg) and not theirs:
            note += (
                " The teacher wasn't evaluated: MODEL.CROSSKD.TEACHER.EVAL_AT_START True does it "
                "in training, --evaluate-teacher now."
            )
        body = f"<table>{head}</tr>{''.join(rows)}</table>"
        page.add(f"AP by class ({task})", body, paragraph(note, note=True))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _add_worst(page: Page, networks: Networks, images: int, shown: int, threshold: float) -> None:
    if not networks.cfg.DATASETS.TEST:
        page.add("Worst images", paragraph("DATASETS.TEST is empty."))
        return
    name, records = networks.cfg.DATASETS.TEST[0], pictures.load_records(networks.cfg)
    chosen = [records[i] for i in spread_evenly(images, len(records))]
    chosen = [record for record in chosen if "annotations" in record]
    if not chosen:
        page.add("Worst images", paragraph(f"{name} has no annotations to compare with."))
        return
    inputs = pictures.load_inputs(networks.cfg, chosen, f"data set {name!r}")
    truths = [record["annotations"] for record in chosen]
    order = rank_images(networks.student, inputs, truths, threshold=threshold)
    names, rows = networks.names(), []
    for i in order[:shown]:
        found = {k: v[0] for k, v in predict_all(networks.student, [inputs[i]]).items()}
        drawn = draw_row(inputs[i]["file_name"], found, names, truths[i], threshold=threshold)
        captions = []
        for column in drawn:
            same_classes = list(names[column]) == list(names["student"])
            caption = column
            if column in found and same_classes:
                caption += f": {_tell(errors_of(found[column], truths[i], threshold))}"
            captions.append(caption)
        cells = [picture(image, column) for column, image in drawn.items()]
        rows.append(paragraph(os.path.basename(inputs[i]["file_name"])))
        rows.append(picture_row(cells, captions))
    note = (
        f"Of {len(chosen)} images of {name}, those where the student's F1 is lowest. A detection "
        f"counts from a score of {threshold:g}, and is right with an overlap (IoU) of at least 0.5 "
        "with an object of its class."
    )
    page.add("Worst images", paragraph(note, note=True), *rows)


def _tell(errors: Errors) -> str:
    return f"{errors.right} right, {errors.missed} missed, {errors.false} false"


def _add_cost(page: Page, record: RunRecord, networks: Optional[Networks]) -> None:
    rows: List[Sequence[Any]] = []
    seconds = record.median("time")
    for key, what in (
        ("time", "an iteration, median"),
        ("data_time", "waiting for data in an iteration, median"),
        ("crosskd/teacher_seconds", "the teacher's forward in an iteration, median"),
    ):
        value = record.median(key)
        if value is not None:
            rows.append((what, f"{value:.3f} s"))
    if seconds is not None:
        hours = seconds * record.iterations / 3600
        rows.append((f"{record.iterations} iterations at the median speed", f"{hours:.2f} h"))
    memory = record.peak_gpu_megabytes()
    if memory is not None:
        rows.append(("peak GPU memory", f"{memory} MiB"))
    if networks is not None:
        size = os.path.getsize(networks.cfg.MODEL.WEIGHTS) / 2**20
        rows.append(("student", f"{count_parameters(networks.student) / 1e6:.2f} M parameters"))
        if networks.teacher is not None:
            count = count_parameters(networks.teacher.model)
            rows.append(("teacher", f"{count / 1e6:.2f} M parameters"))
        name = os.path.basename(networks.cfg.MODEL.WEIGHTS)
        rows.append((f"{name}, with the optimizer's state", f"{size:.1f} MiB"))
    page.add("Cost", table(rows, ("of the training", ""), numbers_from=1))


def _add_settings(page: Page, record: RunRecord, networks: Optional[Networks]) -> None:
    parts = []
    if networks is not None and networks.distils:
        parts.append(f"<pre>{escape(describe_distillation(networks.student, networks.cfg))}</pre>")
    changed = table(record.settings(), ("key", "value", "default"))
    whole = f"<pre>{escape(record.cfg.dump())}</pre>"
    parts.append(f"<details open><summary>All that isn't default</summary>{changed}</details>")
    parts.append(f"<details><summary>The whole config</summary>{whole}</details>")
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    machine = hardware(record.cfg.MODEL.DEVICE, torch.get_num_threads())
    where = f"This page was made with {made}, on {machine}."
    page.add("Settings", *parts, paragraph(where, note=True))
