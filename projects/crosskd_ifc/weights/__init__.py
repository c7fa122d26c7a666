"""Weight files: reading them safely and strictly, converting other projects', exporting students.

Imports ``common`` and ``config``.
"""
