"""The commands: scripts in a checkout, ``crosskd_ifc.tools`` in the installed package."""
