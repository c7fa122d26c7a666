"""What all rooms share: files and paths, config files, random state, environment, plotting.

Imports nothing of the package but :mod:`crosskd_ifc.config`.
"""
