"""What is said of a loss that is not finite: which one, on which images, and the teacher's part."""

import collections
from typing import Any, Deque, Dict, List, Tuple

import torch
from torch import nn

from ..modeling.student import unwrap

# In OUTPUT_DIR of a run whose loss was not finite: {"iteration", "what"}.
DIVERGED = "diverged.json"


class LastStepRecorder:
    """Remembers the images and the losses of a model's last training step."""

    def __init__(self, model: nn.Module, passes: int = 1):
        """
        Args:
            model: a detectron2 detector, or a DDP wrapper around it.
            passes: how often a step runs it.
        """
        # Images and losses of each.
        self._passes: Deque[Tuple[List[Dict[str, Any]], Dict[str, torch.Tensor]]]
        self._passes = collections.deque([([], {})], maxlen=passes)
        model.register_forward_pre_hook(self._keep_batch)
        model.register_forward_hook(self._keep_losses)

    def explain(self, model: nn.Module, iteration: int, error: Exception) -> str:
        """Which loss isn't finite, on which images, and whether the teacher's features are.

        Args:
            model: whose teacher, if it has one, is asked.
            iteration: for the message.
            error: detectron2's.
        """
        batch, losses = next((x for x in self._passes if _not_finite(x[1])), self._passes[-1])
        terms = _not_finite(losses)
        images = ", ".join(str(x.get("file_name", x.get("image_id", "?"))) for x in batch)
        if terms:
            what = f"not finite at iteration {iteration}: {', '.join(terms)}"
        elif losses:
            what = (
                f"a loss of another process is not finite at iteration {iteration} (see its log); "
                "those of this process are"
            )
        else:  # detectron2's RPN looks at its proposals
            what = f"at iteration {iteration}: {str(error).strip()}"
            what = what.rstrip(".")
        about = "" if losses and not terms else self._about_teacher(model, batch)
        return f"{what}. Images: {images or 'none'}.{about}"

    def _about_teacher(self, model: nn.Module, batch: List[Dict[str, Any]]) -> str:
        teachers = getattr(unwrap(model), "teachers", ())
        if not teachers or not batch:
            return ""
        features = {
            f"teacher_{i}/{k}" if i > 1 else k: v
            for i, teacher in enumerate(teachers, 1)
            for k, v in teacher.features(batch).items()
        }
        bad = _not_finite(features)
        if bad:
            return f" The teacher's own features of them are not finite: {', '.join(bad)}."
        return " The teacher's own features of them are finite."

    def _keep_batch(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self._passes.append((inputs[0], {}))

    def _keep_losses(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self._passes[-1][1].update({k: v.detach() for k, v in output.items()})


def _not_finite(losses: Dict[str, torch.Tensor]) -> List[str]:
    return [k for k, v in losses.items() if not torch.isfinite(v).all()]
