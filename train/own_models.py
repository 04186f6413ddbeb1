"""Whose code commands run: that of our own model types, which is here. Importing this module registers them.

A checkpoint of another model type that brings code (`auto_map`) is refused by transformers, unless the user gives
`--trust_remote_code`. Of ours the installed code is taken either way, and never what lies in the folder.
"""

import modeling_latentvlm  # noqa: F401
import processing_latentvlm  # noqa: F401


TRUST_HELP = "Run the code that a checkpoint of another model type brings. Those of this library need no such trust."
