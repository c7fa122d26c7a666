"""A box head as a list of named layers, so that it can be entered and left anywhere.

Shape shorthand: R RoIs, C channels, (P, P) pooler resolution, D width of a fully connected layer.
"""

import re
from typing import Dict, List, Tuple

import torch
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import nn

Shape = Tuple[int, ...]


class BoxHeadLayers:
    """The layers ``pool`` < ``conv1`` < ... < ``fc1`` < ... of a :class:`FastRCNNConvFCHead`.

    ``pool`` is the pooled map (R, C, P, P) that enters the head; ``convk`` and ``fck`` are outputs
    after norm (if any) and ReLU; flattening belongs to ``fc1``. The modules stay those of the head:
    nothing is copied.
    """

    def __init__(self, box_head: nn.Module, pooler_resolution: Tuple[int, int]):
        """
        Args:
            box_head: the head to split.
            pooler_resolution: (height, width) of the pooled map.

        Raises:
            TypeError: if the head is of another type, whose layers are not known.
        """
        # A subclass with another forward or more children computes something else than its layers.
        names = dict(box_head.named_children())
        if getattr(type(box_head), "forward", None) is not FastRCNNConvFCHead.forward or not all(
            re.fullmatch(r"(conv|fc|fc_relu)\d+|flatten", name) for name in names
        ):
            raise TypeError(
                f"box head {type(box_head).__name__} ({', '.join(names)}) has no known layers to "
                "tap or enter; use FastRCNNConvFCHead (MODEL.ROI_BOX_HEAD.NAME)"
            )
        self._layers: Dict[str, List[nn.Module]] = {}
        self.shapes: Dict[str, Shape] = {}
        prefix: List[nn.Module] = []
        for name, module in names.items():
            if name.startswith("conv"):
                channels, size = module.in_channels, tuple(pooler_resolution)
                self.shapes.setdefault("pool", (channels, *size))
                self._layers[name], self.shapes[name] = [module], (module.out_channels, *size)
            elif name.startswith("fc_relu"):
                self._layers[f"fc{name[len('fc_relu'):]}"].append(module)
            elif name.startswith("fc"):
                area = pooler_resolution[0] * pooler_resolution[1]
                self.shapes.setdefault("pool", (module.in_features // area, *pooler_resolution))
                self._layers[name], self.shapes[name] = prefix + [module], (module.out_features,)
                prefix = []
            else:  # flatten
                prefix = [module]
        self.names = ["pool", *self._layers]

    @property
    def last(self) -> str:
        return self.names[-1]

    def depth(self, name: str) -> int:
        """Position of a layer, ``pool`` being 0."""
        return self.names.index(name)

    def output_module(self, name: str) -> nn.Module:
        """The module whose output is the layer's (for ``fck`` its ReLU); ``pool`` has none."""
        return self._layers[name][-1]

    def parameters(self, name: str) -> List[nn.Parameter]:
        """The parameters of one layer; ``pool`` has none."""
        return [p for module in self._layers.get(name, ()) for p in module.parameters()]

    def run(self, x: torch.Tensor, after: str, until: str = "") -> torch.Tensor:
        """Apply the layers after ``after`` up to and including ``until`` (default: the last).

        Args:
            x: the output of layer ``after``.

        Returns:
            The output of layer ``until``; ``x`` itself if the two are the same.
        """
        for name in self.names[self.depth(after) + 1 : self.depth(until or self.last) + 1]:
            for module in self._layers[name]:
                x = module(x)
        return x

    def trace(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The output of every layer, from the pooled map ``x`` (R, C, P, P) on."""
        outputs = {"pool": x}
        for previous, name in zip(self.names, self.names[1:]):
            outputs[name] = self.run(outputs[previous], previous, name)
        return outputs
