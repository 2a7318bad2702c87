"""Builds llama.cpp's server for this very processor, from the sources in the package `llama-cpp-python`.

Run as `python llama_cpp.py FOLDER` by the Python of the environment that FOLDER is, which has cmake and ninja: puts
`llama-server` and `llama-quantize` into its `bin`. It needs a C++ compiler, and minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SOURCE = "llama-cpp-python==0.3.36"
_PROGRAMS = ("llama-server", "llama-quantize")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # Its page would be fetched, and nobody looks at it; nor does anybody here ask for https.
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def main(environment: Path) -> None:
    """Build it. Raises CalledProcessError where a step fails."""
    programs = environment / "bin"
    with tempfile.TemporaryDirectory(dir=environment) as name:
        folder = Path(name)
        fetch = ["-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps", "--no-binary"]
        _run(sys.executable, *fetch, "llama-cpp-python", "--dest", name, SOURCE)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(folder.glob("*/vendor/llama.cpp"))
        build = folder / "build"
        options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
        ninja = f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}"
        _run(str(programs / "cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja", ninja, *options)
        _run(str(programs / "cmake"), "--build", str(build), "--target", *_PROGRAMS)
        for program in _PROGRAMS:
            shutil.copy2(build / "bin" / program, programs / program)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, env={**os.environ, "PIP_PROGRESS_BAR": "off"})


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
