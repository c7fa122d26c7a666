"""Looking at trained networks: pictures of detections and features, predictions on any images, a
page for a training, the cost of a step.

Imports ``training`` and what lies below it.
"""
