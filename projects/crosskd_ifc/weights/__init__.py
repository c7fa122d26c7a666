"""Weight files: reading them safely and strictly, converting other projects', exporting students.

Imports ``common`` and ``config``, and of ``data`` what reads the images that an export is verified
on. Models are built by detectron2's registry alone.
"""
