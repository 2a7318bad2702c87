"""What a machine without network lacks of this project's packages: from wheels that `fetch` brought beside this file.

Standard library only, and used before anything else is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

WHEELS = Path(__file__).with_name("wheels")
SITE = Path(__file__).with_name(".site")
_USED = "LOCAL_LLM_BENCHMARK_SITE"  # in the environment of a process that has them


def use() -> None:
    """Start this program again with the wheels at hand, where some are there and this Python lacks the server's needs.

    A failed installation ends the program with pip's own words.
    """
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels or _USED in os.environ or all(find_spec(name) for name in ("flask_openapi3", "waitress", "orjson")):
        return
    site = SITE / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not site.exists():
        print("Unpacking the wheels", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--disable-pip-version-check", "--target", str(site), *map(str, wheels)])
        if done.returncode:
            sys.exit(done.returncode)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    os.environ.update({_USED: str(site), "PYTHONPATH": path})
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]])
