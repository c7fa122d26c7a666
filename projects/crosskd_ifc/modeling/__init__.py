"""What registers itself in detectron2: students, heads that can be recorded, backbones; and how a
student gets its teacher.

Imports ``distillation``, ``data``, ``weights``, ``common`` and ``config``.
"""
