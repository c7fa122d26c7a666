"""Studies: runs of ``tools/train_net.py`` as children, protocols, paired statistics, reports.

Imports every other room.
"""
