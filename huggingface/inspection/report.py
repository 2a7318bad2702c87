"""Preflight's report on one model, wherever its files are: what they say, and the first problem that prevents a load.

Problems have the loader's own messages. Any thread may make a report; nothing is kept. Must not know how the files are
reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..errors import (
    DependencyMissing,
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    LoadError,
    ModelUnsupported,
    NotServed,
    public,
)
from ..modeling import rotary
from ..tasks import Head
from ..types import LoadOptions
from . import contents, packages, rules
from . import folder as files
from .gguf_parts import PartsDisagree, join
from .heads import AUTO_CLASSES
from .lora import CONFIG, WEIGHTS, check, check_config, check_factors, check_pickled, read_head
from .names import Names
from .sources import Place

_MANY = 8  # with more files of weights, the Hub's own count of parameters replaces reading each header

_PLAIN_GGUF = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}


class Look:
    """The report on the files at one place; `details` are filled in as they are found."""

    def __init__(self, place: Place, options: LoadOptions, names: Names, wanted: tuple[Head, ...] | None) -> None:
        """`wanted` are the heads of the type that the model is registered as, None where it is not registered."""
        self._place, self._options, self._names, self._wanted = place, options, names, wanted
        self.products: dict[str, tuple[int, ...]] = {}  # the shapes of the weights by name, as far as they are known
        self.details = {**blank(), "reachable": True, "source": place.source, "commit": place.commit}

    def take(self, gguf_file: str | None, *, strict: bool = False) -> dict[str, Any]:
        """Reads the files, or only `gguf_file` if given, and returns the details.

        Raises:
            NotServed: with `strict`, for a model that does none of this server's tasks.
        """
        details = self.details
        parts: tuple[Callable[[], None], ...] = (self._config, self._weights, self._adapter)
        for part in parts if gguf_file is None else (partial(self._gguf, gguf_file),):
            try:
                part()
            except LoadError as error:
                if strict and isinstance(error, NotServed):
                    raise
                details["problem"] = details["problem"] or str(error)
        if packages := details["missing_packages"]:
            details["install"] = f"pip install {' '.join(packages)}"
            details["problem"] = details["problem"] or (
                f"Model '{self._place.model_id}' needs packages that are not installed: {', '.join(packages)} "
                f"({details['install']})"
            )
        return details

    def _config(self) -> None:
        """Fills in what config and tokenizer say."""
        details, place, names = self.details, self._place, self._names
        model_id = place.model_id
        if "model_index.json" in place.names and "config.json" not in place.names:
            raise files.diffusion(model_id)
        if ggufs := contents.gguf_names(place):
            details["gguf_files"] = ggufs
            if not {*files.SAFETENSORS, *files.PICKLES, "adapter_config.json"} & set(place.names):
                raise FilesMissing(
                    f"Model '{model_id}' has its weights as GGUF only; name one in gguf_file: {', '.join(ggufs[:5])}"
                )
        config = files.read_config(model_id, place.folder)
        kind = rules.text(config.get("model_type"))
        architectures = rules.strings(config.get("architectures"))
        details["architecture"] = architectures[0] if architectures else None
        details["config_type"] = kind or None
        details["quantized"], _bits = rules.quantization_of(config)
        details["embedding"] = "modules.json" in place.names
        tokenizer = contents.tokenizer_config(place)
        templates = rules.templates_of(tokenizer, contents.template_files(place))
        details["chat_template"] = bool(templates)
        details["tools"] = rules.mentions_tools(templates)
        details["context_length"] = rules.context_of(names, config)
        files.check_templates(model_id, templates)
        if not names.installed:
            details["needs_remote_code"] = bool(config.get("auto_map"))
            raise LoadError(str(DependencyMissing()))
        known = details["known"] = kind in names.configs
        head = rules.head_of(names, config, self._wanted)
        no_text = rules.no_text(names, config, head)
        if no_text is not None:
            head = None
        if head is not None:
            details["tasks"] = rules.tasks_of(names, config, head, tokenizer)
        plain = rules.head_of(names, config) if architectures and no_text is None else head
        details["model_type"] = rules.model_type_of(
            model_id, config, plain, chat=bool(templates), embedding=details["embedding"]
        )
        needs_code = details["needs_remote_code"] = _needs_code(names, config, tokenizer, head)
        if no_text is not None:
            raise NotServed(f"Model '{model_id}' is a {no_text}; it does none of this server's text tasks")
        if head is None and architectures and known and not needs_code:
            raise NotServed(
                f"Model '{model_id}' is a {', '.join(architectures[:3])}, which does none of this server's text tasks"
            )
        needed = packages.quantizer_packages(names, details["quantized"])
        needed |= packages.tokenizer_packages(names, kind, tokenizer, place.names)
        if model_id in self._options.trust_remote_code:
            modules = files.code_modules(place.folder, model_id).get(model_id, [])
            needed |= packages.code_packages(place.folder, modules)
        details["missing_packages"] = packages.missing(needed)
        self._check()
        if needs_code and model_id not in self._options.trust_remote_code:
            raise FilesRefused(
                f"Model '{model_id}' needs Python code of its own repository. If you have read that code and trust it, "
                f"set LOCAL_LLM_TRUST_REMOTE_CODE={model_id}"
            )
        if not known and not needs_code:
            raise ModelUnsupported(
                f"Model '{model_id}': transformers {names.version} does not know this kind of model (model_type in "
                "config.json)"
            )
        if place.listed and not contents.has_tokenizer(place):
            raise FilesMissing(
                f"Model '{model_id}': its folder holds no tokenizer (tokenizer.json); put the complete model there"
            )
        if head is None and self._wanted is not None:
            raise ModelUnsupported(
                f"Model '{model_id}': its config.json does not name the architecture of the weights ('architectures'), "
                f"and a {kind} has none that fits the model's type"
            )

    def _check(self) -> None:
        """Checks that the needed files are there, and that none would run code against the settings."""
        place, options = self._place, self._options
        model_id = place.model_id
        if place.source != "hub":
            files.check(model_id, place.folder, allow_pickle=options.allow_pickle, trusted=options.trust_remote_code)
            return
        for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
            contents.json_object(place, name)
        config = files.read_config(model_id, place.folder)
        known = files.weight_names(config, model_id, allow_pickle=options.allow_pickle)
        if not any(name in place.names for name in known):
            if any(name in place.names for name in files.PICKLES):
                raise files.only_pickles(model_id)
            raise FilesMissing(
                f"Model '{model_id}': its repository on the Hub holds no weights of a kind known here "
                "(model.safetensors)"
            )
        if place.listed:
            for name in contents.weight_files(place, config):
                if name not in place.names:
                    raise FilesMissing(
                        f"Model '{model_id}': its repository on the Hub lacks {name}, so it cannot be loaded here"
                    )

    def _weights(self) -> None:
        """Fills in what the headers of the weights say; leaves that open where they cannot be read."""
        place = self._place
        try:
            config = files.read_config(place.model_id, place.folder)
            names = contents.weight_files(place, config)
        except LoadError:
            return  # the problem is reported already
        self._measure(names, *rules.quantization_of(config))

    def _adapter(self) -> None:
        """Fills in the base model of an adapter."""
        details, place = self.details, self._place
        if "adapter_config.json" not in place.names:
            return
        base = contents.json_object(place, "adapter_config.json").get("base_model_name_or_path")
        details["adapter"] = None if not isinstance(base, str) else public(ValueError(base))
        if "config.json" not in place.names:
            names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in place.names]
            self._measure(names[:1], None, 0)

    def _measure(self, names: list[str], quantization: str | None, bits: int) -> None:
        """Fills in the sizes and types of the weights in the files `names`."""
        details, place = self.details, self._place
        details["files"] = {"count": len(names), "names": names}
        if place.counted and len(names) > _MANY:
            details["parameters"] = sum(place.counted.values())
            details["dtypes"] = rules.bytes_of_counts(place.counted)
        else:
            tensors = contents.tensors(place, names)
            self.products = {name: tensor.shape for name, tensor in tensors.items()} if quantization is None else {}
            if tensors:
                details["parameters"] = rules.count_parameters(tensors, quantization, bits)
                details["dtypes"] = rules.bytes_by_type(tensors.values())
        details["dtype"] = next(iter(details["dtypes"]), None)
        details["weights_bytes"] = contents.bytes_of(place, names)

    def _gguf(self, name: str) -> None:
        """Fills in what a GGUF file says, all of its parts if it has several; it is the only source for its model."""
        details, place, names = self.details, self._place, self._names
        model_id = place.model_id
        parts = contents.gguf_parts(place, name)
        heads = contents.gguf_heads(place, parts)
        try:
            header = join(heads)
        except PartsDisagree as error:
            raise FilesCorrupt(f"Model '{model_id}': {error}") from error
        kind = rules.text(header.values.get("general.architecture"))
        details["architecture"] = details["config_type"] = kind or None
        context = header.values.get(f"{kind}.context_length")
        said = {name: header.values.get(f"{kind}.rope.scaling.{name}") for name in ("type", "factor")}
        said["original_max_position_embeddings"] = header.values.get(f"{kind}.rope.scaling.original_context_length")
        details["context_length"] = rotary.context(context, said) if isinstance(context, int) else None
        template = rules.text(header.values.get("tokenizer.chat_template"))
        details["chat_template"] = bool(template)
        details["tools"] = rules.mentions_tools([template])
        files.check_templates(model_id, [template])
        details["files"] = {"count": len(parts), "names": parts}
        details["weights_bytes"] = contents.bytes_of(place, parts)
        if header.tensors is not None:
            details["parameters"] = sum(tensor.count for tensor in header.tensors.values())
            details["dtypes"] = rules.bytes_by_type(header.tensors.values())
            details["dtype"] = next(iter(details["dtypes"]), None)
            details["quantized"] = "gguf" if {tensor.type for tensor in header.tensors.values()} - _PLAIN_GGUF else None
        if not names.installed:
            raise LoadError(str(DependencyMissing()))
        details["known"] = names.reads_gguf(kind)
        if details["known"]:
            head: Head = "seq2seq-lm" if kind in ("t5", "umt5") else "causal-lm"
            head = "base" if kind == "t5encoder" else head
            details["tasks"] = rules.tasks_of(names, {"model_type": kind}, head, {"mask_token": None})
            details["model_type"] = rules.model_type_of(
                model_id, {"model_type": kind}, head, chat=bool(template), embedding=False
            )
        if kind not in names.gguf_by_itself:
            details["missing_packages"] = packages.missing(["gguf"])
        for part, found in heads.items():
            size = place.size(part)
            if found.end is not None and size is not None and size < found.end:
                raise contents.gguf_damaged(place, part)
        if not details["known"]:
            raise ModelUnsupported(
                f"Model '{model_id}': transformers {names.version} does not read GGUF files of the architecture "
                f"'{public(ValueError(kind))}'"
            )


def blank() -> dict[str, Any]:
    """The details of a model of which nothing is known yet."""
    return {
        "reachable": False,
        "problem": None,
        "source": None,
        "commit": None,
        "architecture": None,
        "config_type": None,
        "known": None,
        "model_type": None,
        "tasks": [],
        "context_length": None,
        "parameters": None,
        "weights_bytes": None,
        "dtype": None,
        "dtypes": {},
        "quantized": None,
        "chat_template": False,
        "tools": False,
        "needs_remote_code": False,
        "missing_packages": [],
        "install": None,
        "embedding": False,
        "files": {"count": 0, "names": []},
    }


def look_at_adapter(what: str, place: Place, products: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses an adapter that the loader would refuse, as far as its config and the header of its weights show.

    `products` are the shapes of the base's weights by their names, as far as they are known.

    Raises:
        LoadError: with the loader's message; `what` begins it.
    """
    if place.source != "hub":
        config, head = check(what, place.folder), read_head(what, place.folder)
    else:
        if CONFIG not in place.names:
            raise FilesMissing(f"{what}: its folder holds no {CONFIG}; put the complete adapter there")
        config = contents.json_object(place, CONFIG)
        check_config(what, config)
        if place.listed and WEIGHTS not in place.names:
            check_pickled(what, place.names)
        head = contents.tensors(place, [WEIGHTS])
    check_factors(what, config, head, products)


def _needs_code(names: Names, config: dict[str, Any], tokenizer: dict[str, Any], head: Head | None) -> bool:
    """Whether the class of config, model or tokenizer is missing in transformers, and the folder names its own."""
    kind = rules.text(config.get("model_type"))
    remote = config.get("auto_map")
    remote = remote if isinstance(remote, dict) else {}
    if remote and kind not in names.configs:
        return True
    if head is not None and AUTO_CLASSES[head] in remote and not names.heads.classes(head, kind):
        return True
    own = tokenizer.get("auto_map")
    own = own.get("AutoTokenizer") if isinstance(own, dict) else own
    declared = rules.text(tokenizer.get("tokenizer_class"))
    known = names.tokenizers.get(kind) is not None or names.is_tokenizer(declared)
    return bool(own) and not known and kind not in names.corrected_tokenizers
