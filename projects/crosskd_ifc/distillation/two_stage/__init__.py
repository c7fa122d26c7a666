"""The parts of a distillation of two-stage detectors: boxes, branches (masks, keypoints), RPN."""
