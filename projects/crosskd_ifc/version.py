"""The version of this package, which setup.py reads without importing it."""

__version__ = "0.2.0"
