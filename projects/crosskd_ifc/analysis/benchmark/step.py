"""What a distillation step costs beside its parts, measured side by side in one run.

Everything is made up: random images, random weights, normalized so that activations have the size
that they have in a trained network.
"""

import dataclasses
import random
import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ...config import ConfigError, class_count
from ...distillation.head_layers import box_stages
from ...distillation.teacher import TeacherPass
from ...modeling.attach import attach_teacher, load_teacher_config
from ...weights.timing import median_and_quartiles
from .instruments import peak_on_cpu, quiet_profiler, timed_modules

#: What is timed: the plain student's training step, the stock float32 teacher's forward on the same
#: images and RoIs, the cross-head pass alone (the teacher's layers that the gradient crosses,
#: forward and backward), and the distillation step.
PARTS = ("student", "teacher", "cross_head", "distillation")


@dataclasses.dataclass(frozen=True)
class Case:
    """The size of the work.

    Attributes:
        height, width: of each image, pixels.
        images: in a batch.
        boxes: ground truth in each image.
    """

    height: int = 320
    width: int = 480
    images: int = 2
    boxes: int = 8

    def __str__(self) -> str:
        return (
            f"{self.images} image{'s' * (self.images != 1)} of {self.height} x {self.width} pixels "
            f"(height x width), {self.boxes} boxes each"
        )


def make_batch(case: Case, num_classes: int, has_masks: bool = False) -> List[Dict[str, Any]]:
    """Random uint8 images with random objects, as detectron2's training loader gives them."""
    batch = []
    size = (case.height, case.width)
    for _ in range(case.images):
        corners = torch.rand(case.boxes, 2) * torch.tensor([case.width, case.height]) * 0.7
        sides = (0.05 + 0.25 * torch.rand(case.boxes, 2)) * min(size)
        truth = Instances(size, gt_boxes=Boxes(torch.cat([corners, corners + sides], dim=1)))
        truth.gt_classes = torch.randint(num_classes, (case.boxes,))
        if has_masks:
            truth.gt_masks = BitMasks(torch.ones(case.boxes, *size, dtype=torch.bool))
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        batch.append({"image": image, "instances": truth, "height": size[0], "width": size[1]})
    return batch


class StepBenchmark:
    """A student, its twin without a teacher, a stock teacher, and a batch for all of them."""

    def __init__(self, cfg: CfgNode, case: Case):
        """
        Args:
            cfg: a student's config that names its teacher's; no weights are loaded.
            case: the size of the work.

        Raises:
            ConfigError: if there is no such teacher, there are several, or it is of a LazyConfig.
        """
        teachers = len(cfg.MODEL.CROSSKD.TEACHERS)
        if teachers > 1:
            raise ConfigError(
                f"MODEL.CROSSKD.TEACHERS has {teachers} teachers, but the benchmark times a step "
                "with one; set it to () and name one in MODEL.CROSSKD.TEACHER"
            )
        torch.manual_seed(0)
        device = torch.device(cfg.MODEL.DEVICE)
        teacher_cfg, _ = load_teacher_config(cfg)
        if not isinstance(teacher_cfg, CfgNode):
            raise ConfigError(
                "MODEL.CROSSKD.TEACHER.CONFIG_FILE is a LazyConfig; the benchmark needs a teacher "
                "of a YAML config"
            )
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        self.plain = build_model(cfg).train()
        self.student = build_model(cfg).train()
        self.stock_teacher = build_model(teacher_cfg).eval().requires_grad_(False)
        teacher = build_model(teacher_cfg)
        self.batch = make_batch(case, class_count(cfg)[1], cfg.MODEL.MASK_ON)
        for model in (self.plain, self.stock_teacher):
            _normalize(model, self.batch)
        self.student.load_state_dict(self.plain.state_dict())
        teacher.load_state_dict(self.stock_teacher.state_dict())
        attach_teacher(self.student, cfg, teacher=teacher)
        self._amp = cfg.SOLVER.AMP.ENABLED and device.type == "cuda"
        self._device = device
        self._optimizers = {m: build_optimizer(cfg, m) for m in (self.plain, self.student)}
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the same weights, and so the same work, in every round
        self._trace, self._layers = self._record()
        self.parts: Dict[str, Callable[[], None]] = {
            "student": lambda: self._step(self.plain),
            "teacher": self._run_teacher,
            "cross_head": self._run_cross_head,
            "distillation": lambda: self._step(self.student),
        }
        if not self.student.has_cross_head:
            del self.parts["cross_head"]

    def measure(self, rounds: int, warmup: int = 2) -> Dict[str, List[float]]:
        """Seconds of each part in each round; in a round, all parts run once in random order."""
        order, seconds = list(self.parts), {name: [] for name in self.parts}
        shuffle = random.Random(0).shuffle
        for i in range(warmup + rounds):
            shuffle(order)
            for name in order:
                torch.manual_seed(i)  # the same RoIs in all parts of a round
                taken = self._time(self.parts[name])
                if i >= warmup:
                    seconds[name].append(taken)
        return seconds

    def peak_memory(self) -> Dict[str, int]:
        """The most bytes of tensors that each part has alive at once beyond those before it."""
        return {name: self._peak(part) for name, part in self.parts.items()}

    def teacher_bytes(self) -> int:
        """Of the teacher's weights."""
        tensors = [*self.stock_teacher.parameters(), *self.stock_teacher.buffers()]
        return sum(x.numel() * x.element_size() for x in tensors)

    def breakdown(self, rounds: int) -> Dict[str, float]:
        """Median seconds of the pieces of a distillation step: forward passes by module, what is
        left of the forward (cross-head, losses, matching), backward, optimizer."""
        student, teacher = self.student, self.student.teacher.model
        modules = {"student backbone": student.backbone, "teacher backbone": teacher.backbone}
        if isinstance(student, GeneralizedRCNN):
            modules["student RPN"] = student.proposal_generator
            modules["student RoI heads"] = student.roi_heads
            modules["teacher RoIAlign"] = teacher.roi_heads.box_pooler
        else:
            modules["student head"] = student.head
        found: Dict[str, List[float]] = {}
        for i in range(rounds + 1):
            pieces = dict.fromkeys(modules, 0.0)
            with timed_modules(modules, pieces, self._clock):
                torch.manual_seed(i)
                self._step(student, pieces)
            if i:
                for name, value in pieces.items():
                    found.setdefault(name, []).append(value)
        medians = {name: statistics.median(values) for name, values in found.items()}
        inside = sum(medians[name] for name in modules)
        medians["rest of the forward"] = medians.pop("forward") - inside
        return medians

    def profile(self, path: str) -> None:
        """Write what one distillation step does, and where a GPU idles, as a Chrome trace."""
        quiet_profiler()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._step(self.student)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            self._step(self.student)
        profile.export_chrome_trace(path)

    def _step(self, model: nn.Module, pieces: Any = None) -> None:
        times = [self._clock()]
        with EventStorage(), torch.autocast(self._device.type, enabled=self._amp):
            losses = sum(model(self.batch).values())
        times.append(self._clock())
        self._optimizers[model].zero_grad()
        losses.backward()
        times.append(self._clock())
        self._optimizers[model].step()
        times.append(self._clock())
        if pieces is not None:
            names = ("forward", "backward", "optimizer")
            pieces.update({n: b - a for n, a, b in zip(names, times, times[1:])})

    def _run_teacher(self) -> None:
        """As stock detectron2 runs it: all in float32, with nothing of this project's."""
        model, trace = self.stock_teacher, self._trace
        with torch.no_grad():
            features = model.backbone(model.preprocess_image(self.batch).tensor)
            if not isinstance(model, GeneralizedRCNN):
                model.head([features[name] for name in model.head_in_features])
                return
            heads = model.roi_heads
            levels = [features[name] for name in heads.box_in_features]
            for part, boxes in self._parts_of(trace):
                head, _, predictor = box_stages(heads)[part.stages.teacher]
                predictor(head(heads.box_pooler(levels, boxes.boxes)))
            if heads.mask_on and len(trace.mask.instances):
                levels = [features[name] for name in heads.mask_in_features]
                heads.mask_head.layers(heads.mask_pooler(levels, trace.mask.boxes))

    def _run_cross_head(self) -> None:
        for (part, trace), layers in zip(self._parts_of(self._trace), self._layers):
            trace = dataclasses.replace(trace, layers=_leaves(trace.layers))
            terms = part.mimic.terms(trace, layers)
            _sum([[x.logits, x.deltas] for x in terms]).backward()

    def _parts_of(self, trace: Any) -> List[Tuple[Any, Any]]:
        """Each box head's part of the distillation, and what it sees."""
        box = self.student.distiller.box
        if not isinstance(self.student, GeneralizedRCNN):
            return [(box, trace)]
        return [(part, trace.stages[part.stages.student]) for part in box.parts]

    def _record(self) -> Tuple[Any, List[Any]]:
        """The trace of a step, and the teacher's layers on it for each part; without graph."""
        with EventStorage(), torch.no_grad(), self.plain.record() as trace:
            self.plain(self.batch)
        run, parts = TeacherPass(self.student.teacher, self.batch), self._parts_of(trace)
        if isinstance(self.student, GeneralizedRCNN):
            return trace, [part.predict(run, x.boxes)[1] for part, x in parts]
        return trace, [part.run_teacher(run)[0] for part, _ in parts]

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _time(self, part: Callable[[], None]) -> float:
        start = self._clock()
        part()
        return self._clock() - start

    def _peak(self, part: Callable[[], None]) -> int:
        part()  # caches, gradients and momentum are there afterwards
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            part()
            return torch.cuda.max_memory_allocated(self._device) - before
        return peak_on_cpu(part)


@torch.no_grad()
def _normalize(model: nn.Module, batch: List[Dict[str, Any]]) -> None:
    """Set the statistics of the backbone's norms to those of ``batch``.

    With statistics of 0 and 1, activations of random weights grow from block to block until
    sigmoids underflow, and a CPU computes with denormal numbers a hundred times slower.
    """

    def measure(norm: nn.Module, inputs: Tuple[torch.Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    norms = [m for m in model.modules() if isinstance(m, (FrozenBatchNorm2d, nn.BatchNorm2d))]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    model.backbone(model.preprocess_image(batch).tensor)
    for handle in handles:
        handle.remove()


def _leaves(x: Any) -> Any:
    """The same nested tensors, as leaves that want a gradient."""
    if isinstance(x, torch.Tensor):
        return x.detach().requires_grad_()
    if isinstance(x, dict):
        return {key: _leaves(value) for key, value in x.items()}
    return [_leaves(value) for value in x]


def _sum(x: Any) -> Any:
    """Of all elements of nested tensors."""
    return x.sum() if isinstance(x, torch.Tensor) else sum(map(_sum, x))


def summarize_times(seconds: Mapping[str, Sequence[float]]) -> Dict[str, Any]:
    """Medians, quartiles and ratios, the ratios taken within each round.

    Args:
        seconds: from :meth:`StepBenchmark.measure`.

    Returns:
        "seconds" and "ratios", name -> {"median", "quartiles"}: "c/a" is the distillation step over
        the plain student's, "c/(a+b)" over the student's and the stock teacher's forward,
        "c/floor" over these and the cross-head pass, "(a+b)/a" what no implementation without a
        faster teacher can beat.
    """
    zeros = [0.0] * len(seconds["student"])
    rows = list(zip(*(seconds.get(name, zeros) for name in PARTS)))
    ratios = {
        "c/a": [c / a for a, b, d, c in rows],
        "c/(a+b)": [c / (a + b) for a, b, d, c in rows],
        "c/floor": [c / (a + b + d) for a, b, d, c in rows],
        "(a+b)/a": [(a + b) / a for a, b, d, c in rows],
    }
    return {
        "seconds": {name: median_and_quartiles(values) for name, values in seconds.items()},
        "ratios": {name: median_and_quartiles(values) for name, values in ratios.items()},
    }
