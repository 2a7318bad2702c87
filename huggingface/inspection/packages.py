"""Finds the missing Python packages that a model needs: for its tokenizer, its quantization, and its own code.

Packages are searched for, not imported. Pure functions of a folder and of transformers' sources; any thread may call
them. Must not know the Hub or where the folder is from.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import folder as files
from .names import Names

# Package (as for `pip install`) -> module, where the module is not just the package's name with `_` for `-`.
_MODULES: Mapping[str, str] = {
    "protobuf": "google.protobuf",
    "optimum-quanto": "optimum.quanto",
    "amd-quark": "quark",
    "flute-kernel": "flute",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "opencv-python": "cv2",
    "pyyaml": "yaml",
    "beautifulsoup4": "bs4",
    "flash-attn": "flash_attn",
}
_PACKAGES: Mapping[str, str] = {module: package for package, module in _MODULES.items()}
# The packages that split words for BERT's Japanese tokenizer, by the name in its config.
_JAPANESE: Mapping[str, tuple[str, ...]] = {
    "mecab": ("fugashi",),
    "sudachi": ("sudachipy", "sudachidict-core"),
    "jumanpp": ("rhoknp",),
}
_DICTIONARIES: Mapping[str, str] = {"ipadic": "ipadic", "unidic_lite": "unidic-lite", "unidic": "unidic"}


def missing(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed, sorted."""
    return sorted({package for package in packages if not _installed(_MODULES.get(package, package.replace("-", "_")))})


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def quantizer_packages(names: Names, method: str | None) -> set[str]:
    """The packages that loading weights of this quantization needs."""
    modules = names.quantizer_modules(method) if method is not None else ()
    return {_PACKAGES.get(module, module.replace("_", "-")) for module in modules}


def tokenizer_packages(
    names: Names, config_type: str, tokenizer: Mapping[str, Any], present: Collection[str]
) -> set[str]:
    """The packages that the tokenizer needs, by its config and its files."""
    declared = tokenizer.get("tokenizer_class")
    own = declared if isinstance(declared, str) else names.tokenizers.get(config_type) or ""
    own = own.removesuffix("Fast")
    packages = set(names.tokenizer_packages(own))
    if own == "BertJapaneseTokenizer":
        splitter = tokenizer.get("word_tokenizer_type")
        packages |= set(_JAPANESE.get(splitter if isinstance(splitter, str) else "", ()))
        if splitter == "mecab":
            options = tokenizer.get("mecab_kwargs")
            wanted = options.get("mecab_dic", "unidic_lite") if isinstance(options, dict) else "unidic_lite"
            packages |= {_DICTIONARIES[wanted]} if wanted in _DICTIONARIES else set()
    top = {name for name in present if "/" not in name}
    if not any(name.startswith("tokenizer") and name.endswith(".json") and "config" not in name for name in top):
        if "tekken.json" in top and not any(name.endswith((".model", ".txt")) for name in top):
            packages.add("mistral-common")
        if "tiktoken.model" in top or any(name.endswith(".tiktoken") for name in top):
            packages.add("tiktoken")
        elif any(name.endswith((".model", ".spm")) for name in top):
            packages |= {"sentencepiece", "protobuf"}
    return {package for package in packages if package not in ("torch", "vision", "tf", "tokenizers")}


def code_packages(folder: Path, modules: Iterable[str]) -> set[str]:
    """The packages that a model's Python files in the folder import."""
    packages: set[str] = set()
    pending, seen = list(modules), set(modules)
    while pending:
        path = folder / f"{pending.pop()}.py"
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        packages |= {_PACKAGES.get(name, name) for name in _imports(tree) if name not in sys.stdlib_module_names}
        more = set(files.relative_imports(source)) - seen
        pending += more
        seen |= more
    return packages


def _imports(node: ast.AST) -> Iterator[str]:
    """The packages that code imports and needs, found as transformers finds them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try):
            continue  # the code handles missing packages itself
        if isinstance(child, ast.If) and (
            "is_flash_attn" in ast.unparse(child.test) or "TYPE_CHECKING" in ast.unparse(child.test)
        ):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level and child.module:
            yield child.module.partition(".")[0]
        else:
            yield from _imports(child)
