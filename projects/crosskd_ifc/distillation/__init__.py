"""The method: from what a step of the student saw to the distillation losses.

Read it in this order: ``losses`` (formulas), ``head_layers`` (heads as named layers), ``fusion``
(what of the taps enters the teacher, combined in one of the ways of ``fusion_types`` or each by
itself), ``teacher`` (the frozen detector), ``traces`` (what a step saw and computed), then what
compares student and teacher: ``two_stage`` (boxes, masks and keypoints, RPN), ``dense``,
``feature``. ``distiller`` puts them together, ``several`` does so for several teachers.
``compatibility`` says whether two detectors fit each other; ``loss_types`` are the losses of other
methods, which may stand in for the method's own.

Imports ``common`` and ``config``; never the students, the training or the data.
"""
