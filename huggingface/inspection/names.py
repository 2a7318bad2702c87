"""Reads the tables of the installed transformers from its source files, since importing it takes seconds.

The tables are literals: the kinds of model, the classes of each head, and the defaults of configs. One object reads
each table once, at its first use; any thread may call it. Where transformers is not installed, `installed` is false and
the tables are empty. Must not know files of models, the Hub or the registry.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .heads import TABLES, Heads, Inputs


class Names:
    """The tables of the installed transformers."""

    def __init__(self) -> None:
        self._defaults: dict[str, Mapping[str, Any]] = {}
        self._packages: dict[str, frozenset[str]] = {}

    @cached_property
    def folder(self) -> Path | None:
        """The folder of the installed transformers, or None."""
        try:
            found = find_spec("transformers")
        except (ImportError, ValueError):
            return None
        return Path(found.origin).parent if found is not None and found.origin else None

    @property
    def installed(self) -> bool:
        """Whether transformers is installed."""
        return self.folder is not None

    @property
    def version(self) -> str:
        """The version of transformers, for messages."""
        try:
            return metadata.version("transformers")
        except metadata.PackageNotFoundError:
            return ""

    # The tables -------------------------------------------------------------------------------------------------------

    @cached_property
    def configs(self) -> Mapping[str, str]:
        """The config class of each kind of model (`model_type` in config.json)."""
        return self._mappings("CONFIG_MAPPING_NAMES")

    @cached_property
    def heads(self) -> Heads:
        """The architectures of each head."""
        source = self._source("models/auto/modeling_auto.py")
        return Heads({table: dict(_literal_pairs(source, table)) for table in TABLES})

    def inputs(self, config_type: str, architecture: str) -> Inputs | None:
        """The inputs of a class, from its source; None where the source does not show them."""
        return _inputs(self._own_source("modeling", config_type), architecture)

    @cached_property
    def tokenizers(self) -> Mapping[str, str | None]:
        """The tokenizer class of each kind of model."""
        corrected = dict.fromkeys(self.corrected_tokenizers, "TokenizersBackend")
        return {**corrected, **self._table("models/auto/tokenization_auto.py", "TOKENIZER_MAPPING_NAMES")}

    @cached_property
    def corrected_tokenizers(self) -> frozenset[str]:
        """Kinds of model for which transformers ignores the tokenizer class in their config."""
        source = self._source("models/auto/tokenization_auto.py")
        listed = _statements(source, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS")
        return frozenset(name for statement in listed for name in _strings(statement))

    @cached_property
    def gguf(self) -> frozenset[str]:
        """The architectures of GGUF files that transformers can read."""
        old = self._table("integrations/ggml.py", "GGUF_CONFIG_MAPPING")
        new = self._table("integrations/gguf/gguf_config_mapping.py", "GGUF_CONFIG_ARCHS")
        return frozenset(old | new) - {"general", "tokenizer", "tokenizer_config"}

    @cached_property
    def gguf_by_itself(self) -> frozenset[str]:
        """The architectures of GGUF files that transformers reads without the package `gguf`."""
        return frozenset(self._table("integrations/gguf/gguf_conversion_mapping.py", "GGUF_ARCHS"))

    def is_tokenizer(self, name: str) -> bool:
        """Whether transformers has a tokenizer class of this name."""
        plain = name.removesuffix("Fast")
        return plain in {str(each).removesuffix("Fast") for each in self.tokenizers.values()} | _GENERIC

    def reads_gguf(self, architecture: str) -> bool:
        """Whether transformers loads GGUF files of this architecture, whose name may differ from transformers' own."""
        plain = architecture.replace("-", "_").replace("moe", "_moe").replace("__", "_")
        return bool({architecture, plain} & self.gguf) or architecture.startswith(("t5", "mistral"))

    # A config's class -------------------------------------------------------------------------------------------------

    def config_defaults(self, config_type: str) -> Mapping[str, Any]:
        """The constants in the body of a config class: the defaults of config.json, and other names of its entries."""
        name = self.configs.get(config_type)
        if name is not None and config_type not in self._defaults:
            classes = _class_bodies(self._own_source("configuration", config_type))
            found: dict[str, Any] = {}
            while name in classes:
                body, name = classes.pop(name)
                found = {**body, **found}
            self._defaults[config_type] = found
        return self._defaults.get(config_type, {})

    @cached_property
    def _modules(self) -> Mapping[str, str]:
        return self._mappings("SPECIAL_MODEL_TYPE_TO_MODULE_NAME")

    # A tokenizer's class ----------------------------------------------------------------------------------------------

    def tokenizer_packages(self, name: str) -> frozenset[str]:
        """The packages that a tokenizer class needs besides those of transformers itself."""
        if name not in self._packages:
            kinds = [kind for kind, tokenizer in self.tokenizers.items() if tokenizer == name]
            defined = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
            source = next(filter(defined.search, (self._own_source("tokenization", kind) for kind in kinds)), "")
            asks = re.search(r"@requires\(|requires_backends\(|ImportError", source)
            self._packages[name] = frozenset(_required(ast.parse(source), name) if asks else ())
        return self._packages[name]

    # A quantizer's class ----------------------------------------------------------------------------------------------

    def quantizer_modules(self, method: str) -> set[str]:
        """The modules that loading weights of this quantization needs (`quant_method` of a config)."""
        listed, known = self._source("quantizers/auto.py"), self._source("utils/import_utils.py")
        name = re.search(rf'"{re.escape(method)}(?:_[48]bit)?": (\w+Quantizer),', listed)
        file = re.search(rf"from \.(\w+) import {name[1]}$", listed, re.MULTILINE) if name else None
        source = self._source(f"quantizers/{file[1]}.py") if file else ""
        modules = set()
        for asked in re.findall(r"if (?:is_torch_cuda_available\(\) and )?not (is_\w+_available)\(\):\s+raise", source):
            found = re.search(
                rf'^def {asked}\(.*?_is_package_available\(\s*"([\w.]+)"', known, re.MULTILINE | re.DOTALL
            )
            modules |= {found[1]} if found else set()
        return modules

    # Files ------------------------------------------------------------------------------------------------------------

    def _own_source(self, part: str, config_type: str) -> str:
        """The source of a part of a kind's code, such as `modeling`; empty where there is no such file."""
        module = self._modules.get(config_type) or config_type.replace("-", "_")
        path = f"models/{module}/{part}_{module}.py"
        return self._source(path) if self.folder is not None and (self.folder / path).is_file() else ""

    def _source(self, path: str) -> str:
        return "" if self.folder is None else (self.folder / path).read_text(encoding="utf-8")

    def _table(self, path: str, name: str) -> dict[str, Any]:
        return dict(_literal_pairs(self._source(path), name))

    def _mappings(self, name: str) -> dict[str, Any]:
        """A table of configs from two files: one is generated and holds most of it, one is written by hand."""
        return self._table("models/auto/auto_mappings.py", name) | self._table(
            "models/auto/configuration_auto.py", name
        )


_HAS_MISTRAL = find_spec("mistral_common") is not None
# Classes that read any tokenizer.json, and classes that are always there.
_GENERIC = {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend", "BloomTokenizer"}


def _statements(source: str, name: str) -> Iterator[ast.stmt]:
    """The top-level statements that begin with `name`: the files are long, so only these are parsed."""
    # From the name at a line's start to the next line that is not indented and closes nothing.
    for found in re.finditer(rf"^{name}\b.*?(?=^[^\s)\]}}#]|\Z)", source, re.MULTILINE | re.DOTALL):
        yield from ast.parse(found[0]).body


def _literal_pairs(source: str, name: str) -> Iterator[tuple[str, Any]]:
    """The entries of a table that is built of literals: pairs in lists, and dictionaries."""
    for statement in _statements(source, name):
        yield from _entries(statement)


def _entries(node: ast.AST) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant):
        yield str(node.elts[0].value), _plain(node.elts[1])  # not searched further: its value may be a pair of classes
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield str(key.value), _plain(value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _entries(child)


def _plain(node: ast.expr) -> Any:
    """The value of a literal. A choice by an installed package gives its first branch, since missing packages are
    reported elsewhere, except for mistral-common, which transformers can do without.
    """
    while isinstance(node, ast.IfExp):
        node = node.orelse if "mistral_common" in ast.unparse(node.test) and not _HAS_MISTRAL else node.body
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _strings(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def _class_bodies(source: str) -> dict[str, tuple[dict[str, Any], str]]:
    """The constants of each class of a file, and the name of its first base."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        body = {}
        for entry in node.body:
            target = entry.targets[0] if isinstance(entry, ast.Assign) else getattr(entry, "target", None)
            value = getattr(entry, "value", None)
            if isinstance(entry, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and value is not None:
                try:
                    body[target.id] = ast.literal_eval(value)
                except ValueError:
                    continue
        base = node.bases[0] if node.bases else None
        found[node.name] = (body, base.id if isinstance(base, ast.Name) else "")
    return found


def _inputs(source: str, name: str) -> Inputs | None:
    """A model class's modalities, and the arguments of its `forward` with whether they are required; None where the
    source has no `forward`."""
    modalities: Any = None
    arguments: dict[str, bool] | None = None
    while (
        found := re.search(rf"^class {re.escape(name)}\b.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
    ) is not None:
        tree = ast.parse(found[0]).body[0]
        assert isinstance(tree, ast.ClassDef)  # noqa: S101 - the text begins with `class`
        for entry in tree.body:
            target = entry.targets[0] if isinstance(entry, ast.Assign) else getattr(entry, "target", None)
            if isinstance(target, ast.Name) and target.id == "input_modalities" and modalities is None:
                modalities = _plain(entry.value)  # type: ignore[attr-defined]
            if isinstance(entry, ast.FunctionDef) and entry.name == "forward" and arguments is None:
                given = [each.arg for each in entry.args.args]
                must = len(given) - len(entry.args.defaults)
                arguments = {argument: index < must for index, argument in enumerate(given) if argument != "self"}
        base = tree.bases[0] if tree.bases else None
        if not isinstance(base, ast.Name) or base.id == name:
            break
        name = base.id
    return None if arguments is None else (modalities or "text", arguments)


def _required(tree: ast.Module, name: str) -> Iterator[str]:
    """The packages that a class declares (`requires`), asks for in its constructor, or fails without."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "requires":
                yield from _strings(decorator)
        made = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
        for each in ast.walk(made) if made is not None else ():
            if isinstance(each, ast.Call) and ast.unparse(each.func) == "requires_backends":
                for argument in each.args[1:]:
                    yield from _strings(argument)
            elif isinstance(each, ast.Try) and any(
                isinstance(inner, ast.Raise) for handler in each.handlers for inner in ast.walk(handler)
            ):
                for inner in each.body:
                    if isinstance(inner, ast.Import):
                        yield from (alias.name.partition(".")[0] for alias in inner.names)
