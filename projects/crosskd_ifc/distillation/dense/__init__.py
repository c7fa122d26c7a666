"""The part of a distillation of dense detectors: classes and boxes of all positions."""
