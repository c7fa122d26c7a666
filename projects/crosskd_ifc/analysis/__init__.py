"""Looking at trained pairs: pictures of detections and features, curves, the cost of a step.

Imports ``training`` and what lies below it.
"""
