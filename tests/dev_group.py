"""A plugin of pytest that lets `uv run pytest` install the development tools.

`uv run` alone installs what the service needs, and pytest, because users do not need the tools. pytest loads this plugin
first (`addopts` in pyproject.toml), before it reads options of other plugins, which may not be installed yet.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("xdist") is None and "UV" in os.environ:  # uv sets it in the commands that it runs
    sys.exit(subprocess.call([os.environ["UV"], "run", "--group", "dev", "pytest", *sys.argv[1:]]))
