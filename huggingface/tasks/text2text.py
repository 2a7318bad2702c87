"""The tasks of encoder-decoder models, as in transformers 4.57.6: text to text, summaries, translations.

transformers 5 removed these pipelines; this module has their behaviour, and never changes the given model and
tokenizer. Called on the engine's thread, which alone uses this tokenizer meanwhile. Must not know HTTP, the registry,
or how the model was loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from ..cancellation import NEVER, Cancellation
from ..errors import InvalidRequest, UnknownField
from ..modeling.demand import MemoryClaims, asked_of
from ..modeling.stopping import each_token
from . import inputs as check
from .positions import max_positions
from .vocabulary import check_vocabulary, vocabulary_rows

# The name of each task's answer (4.57.6: `return_name` of the three pipelines in text2text_generation.py).
_KEYS = {"text2text-generation": "generated_text", "summarization": "summary_text", "translation": "translation_text"}
_TRANSLATION = re.compile(r"translation(?:_(?P<source>.+)_to_(?P<target>.+))?")

# The pipelines' settings where neither the model nor its caller sets them (`_default_generation_config`).
_PIPELINE_DEFAULTS = {"max_new_tokens": 256, "num_beams": 4}

# GenerationConfig's own defaults in 4.57.6, where they are not None. transformers 5 has None instead, but 4.57.6
# compares settings with the defaults to decide which of two wins.
_GLOBAL_DEFAULTS: Mapping[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "early_stopping": False,
    "do_sample": False,
    "num_beams": 1,
    "use_cache": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}

# Parameters of the pipelines themselves; all others are `generate`'s.
_OWN_PARAMETERS = frozenset(
    {"truncation", "clean_up_tokenization_spaces", "stop_sequence", "prefix", "return_text", "return_tensors"}
)
_LANGUAGES = frozenset({"src_lang", "tgt_lang"})
# Settings that change the type of `generate`'s result, not the text.
_NOT_TEXT = frozenset({"return_dict_in_generate", "output_scores", "output_logits", "output_attentions"}) | {
    "output_hidden_states"
}
_TRUNCATION = (True, False, "longest_first", "only_first", "do_not_truncate")


class Text2Text:
    """One task on one model: `Text2Text(model, tokenizer, "summarization")("A long text ...")`.

    `model` is a `PreTrainedModel` with a language-modelling head over an encoder and a decoder, on any device;
    `tokenizer` is its own. `task` is a key of `_KEYS`, or `translation_xx_to_yy`. `claims` claims the memory of
    generations. Behaves as 4.57.6's `Text2TextGenerationPipeline`, `SummarizationPipeline`, `TranslationPipeline`.

    Raises:
        InvalidRequest: the `task` is none of these.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: str,
        claims: MemoryClaims | None = None,
    ) -> None:
        translation = _TRANSLATION.fullmatch(task)
        name = "translation" if translation else task
        if name not in _KEYS:
            raise InvalidRequest(f"Invalid value for field 'task': unknown task '{task}'", "task")
        specific: Mapping[str, Any] = getattr(model.config, "task_specific_params", None) or {}
        if task == "translation":
            # 4.57.6's `pipeline()` takes the first translation in the model's config.
            task = next((key for key in specific if key.startswith("translation")), task)
            translation = _TRANSLATION.fullmatch(task)
        self._model = model
        self._tokenizer = tokenizer
        self._claims = claims
        self._name = name
        self._key = _KEYS[name]
        self._task_parameters: Mapping[str, Any] = specific.get(task) or {}
        self._pair = (translation["source"], translation["target"]) if translation else (None, None)
        self._by_language = name == "translation" and hasattr(tokenizer, "_build_translation_inputs")
        self._decoder_positions = max_positions(model.get_decoder())
        self._reads_answer = not model.config.is_encoder_decoder  # the answer continues the text, and counts with it

    def __call__(self, inputs: str | list[str], *, cancellation: Cancellation = NEVER, **parameters: Any) -> list[Any]:
        """Answers `inputs`, one text or a list of them, with `[{"<task>_text": ...}, ...]`.

        For one text: a list with one answer for each of `num_return_sequences`. For a list: a list with one answer each
        or, where several are asked for, a list of such lists. `parameters` are those of the pipelines (`truncation`,
        `clean_up_tokenization_spaces`, `stop_sequence`, `prefix`, for translation `src_lang` and `tgt_lang`) and those
        of `generate` (`max_length`, `num_beams`, ...).

        Raises:
            InvalidRequest: names the field that cannot be honoured.
            Cancelled: by `cancellation`, which is checked between texts and between tokens.
        """
        given = check.texts(inputs)
        own = {name: value for name, value in parameters.items() if name in _OWN_PARAMETERS | _LANGUAGES}
        asked = self._generation_parameters(parameters)
        self._check_own(own)
        if own.get("stop_sequence") is not None:
            asked["eos_token_id"] = self._first_token(own["stop_sequence"])
        if self._by_language and "forced_bos_token_id" in asked:
            raise check.refuse("forced_bos_token_id", "the target language sets it: give tgt_lang only")
        settings = self._settings(asked)
        answers = []
        for index, text in enumerate([given] if isinstance(given, str) else given):
            cancellation.check()
            field = "inputs" if isinstance(given, str) else f"inputs.{index}"
            answers.append(self._answer(text, field, own, asked, settings, cancellation))
        if isinstance(given, str):
            return answers[0]
        return [each[0] for each in answers] if all(len(each) == 1 for each in answers) else answers

    # Parameters -------------------------------------------------------------------------------------------------------

    def _generation_parameters(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the parameters for `generate`; refuses by name those that neither it nor the task knows."""
        from transformers import GenerationConfig

        honoured = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - _NOT_TEXT
        honoured -= {"transformers_version"}
        known = honoured | _OWN_PARAMETERS | (_LANGUAGES if self._name == "translation" else frozenset())
        for name in parameters:
            if name not in known:
                raise UnknownField(name, known)
        asked = {name: copy.deepcopy(value) for name, value in parameters.items() if name in honoured}
        if asked.get("temperature") == 0:  # no randomness: upstream's sampler would divide by 0
            asked |= {"do_sample": False, "temperature": 1.0}
        for name in ("max_new_tokens", "max_length"):
            value = asked.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise check.refuse(name, "must be a whole number of at least 1")
        return asked

    def _check_own(self, own: Mapping[str, Any]) -> None:
        if own.get("return_tensors"):
            raise check.refuse("return_tensors", "tensors cannot travel as JSON")
        if own.get("return_text") is False:
            raise check.refuse("return_text", "without the text there is no answer")
        truncation = own.get("truncation")
        if truncation is not None and truncation not in _TRUNCATION:
            choices = ", ".join(str(choice).lower() for choice in _TRUNCATION)
            raise check.refuse("truncation", f"must be one of {choices}")
        for name in ("stop_sequence", "prefix", *_LANGUAGES):
            if own.get(name) is not None:
                check.text(own[name], name)
        for name in sorted(_LANGUAGES):
            if own.get(name) is not None and not self._by_language:
                reason = "this model's tokenizer knows no language codes"
                raise check.refuse(name, f"{reason}; name the languages in the task instead (translation_en_to_fr)")

    def _first_token(self, stop_sequence: str) -> int:
        """The token that ends the text for `stop_sequence`: its first one, as in `_sanitize_parameters`."""
        ids = self._tokenizer.encode(stop_sequence, add_special_tokens=False)
        if not ids:
            raise check.refuse("stop_sequence", "must hold at least one token")
        return int(ids[0])

    def _settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of `generate` that differ from their defaults, by 4.57.6's order of precedence.

        That order is, strongest first: what is `asked`; the config's `task_specific_params`; the pipeline's 256 new
        tokens and 4 beams; the model's `generation_config` (`Pipeline.__init__` and
        `GenerationMixin._prepare_generation_config`). Two settings are exceptions: the model's `max_length` beats the
        pipeline's 256 new tokens, and a value equal to a global default yields to the model's own. One thing differs
        from upstream, where the 256 new tokens also override a requested `max_length`; they still override that of
        `task_specific_params`.
        """
        from transformers import GenerationConfig

        model = self._model_settings()
        settings: dict[str, Any] = {**model, **_PIPELINE_DEFAULTS}
        if "max_length" in model:
            settings["max_new_tokens"] = None
        if model.get("temperature") == 0:
            settings["do_sample"] = False
        names = vars(GenerationConfig())
        task = {name: value for name, value in self._task_parameters.items() if name in names}
        settings.update(copy.deepcopy(task))
        if settings.get("pad_token_id") is None and self._tokenizer.pad_token_id is not None:
            settings["pad_token_id"] = self._tokenizer.pad_token_id
        if _since_4_50(self._model.generation_config.transformers_version):
            for name, value in model.items():
                default = _GLOBAL_DEFAULTS.get(name)
                if settings.get(name, default) == default:
                    settings[name] = value
        if asked.get("max_length") is not None and asked.get("max_new_tokens") is None:
            settings["max_new_tokens"] = None
        settings.update(asked)
        return settings

    def _lengths(self, settings: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """The settings with limits as total lengths, for a text of so many tokens."""
        start = tokens if self._reads_answer else 1  # a separate decoder starts from one token
        fitted = dict(settings)
        if fitted.get("max_new_tokens") is not None:
            fitted["max_length"] = fitted["max_new_tokens"] + start  # `generate` warns where both are set
            fitted["max_new_tokens"] = None
        longest = fitted.get("max_length")
        for name, least in (("min_length", longest), ("min_new_tokens", longest and longest - start)):
            if least is not None and (fitted.get(name) or 0) > least:
                fitted[name] = least  # the same effect: `generate` warns of a minimum beyond the maximum
        return fitted

    def _model_settings(self) -> dict[str, Any]:
        """The settings of the model's own `generation_config` that differ from the defaults."""
        generation = self._model.generation_config
        values = {name: value for name, value in generation.to_dict().items() if not name.startswith("_")}
        values.pop("transformers_version", None)
        if getattr(generation, "_from_model_config", False):
            # Without a generation_config.json, transformers 5 reads config.json as it is; 4.57.6 took the config
            # object, with its class's values where the file has none (BART's last token is </s>).
            missing = [name for name, value in values.items() if value is None and name not in _NOT_TEXT]
            values |= {name: copy.deepcopy(getattr(self._model.config, name, None)) for name in missing}
        return {
            name: value for name, value in values.items() if value is not None and value != _GLOBAL_DEFAULTS.get(name)
        }

    # From text to text ------------------------------------------------------------------------------------------------

    def _answer(
        self,
        text: str,
        field: str,
        own: Mapping[str, Any],
        asked: Mapping[str, Any],
        settings: Mapping[str, Any],
        cancellation: Cancellation,
    ) -> list[dict[str, str]]:
        import torch

        encoded = self._encode(text, own)
        encoded.pop("token_type_ids", None)  # some tokenizers make them, no `generate` takes them
        forced = {"forced_bos_token_id": encoded.pop("forced_bos_token_id")} if self._by_language else {}
        tokens = int(encoded["input_ids"].shape[-1])
        self._check_length(tokens, field)
        check_vocabulary(int(encoded["input_ids"].max()), vocabulary_rows(self._model), field)
        tensors = {name: value.to(self._model.device) for name, value in encoded.items()}
        try:
            settings = {**self._lengths(settings, tokens), **forced}
            with torch.inference_mode(), _blaming(asked), self._memory(tensors, settings, asked) as reached:
                rows = self._generate(tensors, settings, cancellation, reached)
        except IndexError as error:
            if "out of range in self" not in str(error):  # a position or token outside the model's table
                raise
            raise check.refuse(
                field, "is longer than the model can read, or its answer longer than it can write"
            ) from error
        answers = [self._tokenizer.decode(row, skip_special_tokens=True) for row in rows.tolist()]
        if own.get("clean_up_tokenization_spaces"):
            # Not by `decode`: transformers 5 does it only for some kinds of tokenizers.
            answers = [self._tokenizer.clean_up_tokenization(answer) for answer in answers]
        return [{self._key: answer} for answer in answers]

    def _encode(self, text: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """The model's inputs as tensors; for a tokenizer with language codes, also the answer's first token."""
        truncation = own.get("truncation")
        how = {"truncation": False if truncation is None else truncation, "return_tensors": "pt"}
        asked_prefix = own.get("prefix")
        if not self._by_language:
            prefix = self._task_parameters.get("prefix", getattr(self._model.config, "prefix", None))
            return dict(self._tokenizer(((prefix or "") if asked_prefix is None else asked_prefix) + text, **how))
        source, target = self._languages(own)
        with _restored(self._tokenizer):
            how |= {"src_lang": source, "tgt_lang": target}
            return dict(self._tokenizer._build_translation_inputs((asked_prefix or "") + text, **how))

    def _languages(self, own: Mapping[str, Any]) -> tuple[str, str]:
        """The two language codes, from the parameters or the task's name; the tokenizer must have each."""
        pair = []
        for name, of_task in zip(("src_lang", "tgt_lang"), self._pair, strict=True):
            code = own.get(name) or of_task
            if code is None:
                reason = "this model translates between many languages: give src_lang and tgt_lang"
                raise InvalidRequest(f"Missing required field: {name}; {reason}", name)
            codes = _language_codes(self._tokenizer)
            if code not in codes and f"__{code}__" not in codes:
                known = ", ".join(sorted(codes))
                raise check.refuse(name, f"unknown language code '{code}'. This model knows: {known}")
            pair.append(code)
        return pair[0], pair[1]

    def _check_length(self, length: int, field: str) -> None:
        limit = max_positions(self._model.get_encoder())
        if length == 0:
            raise check.refuse(field, "holds no token that the model knows")
        if limit is not None and length > limit:
            reason = f"has {length} tokens, and the model reads at most {limit}; shorten it, or set truncation to true"
            raise check.refuse(field, reason)

    def _memory(
        self, tensors: Mapping[str, Any], settings: Mapping[str, Any], asked: Mapping[str, Any]
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Holds an answer's memory until the block ends: see `MemoryClaims.held`."""
        if self._claims is None:
            return nullcontext(lambda _: None)
        return self._claims.held(asked_of(self._model, settings, int(tensors["input_ids"].shape[-1]), asked))

    def _generate(
        self,
        tensors: Mapping[str, Any],
        settings: Mapping[str, Any],
        cancellation: Cancellation,
        reached: Callable[[int], None],
    ) -> Any:
        """The tokens of each answer, `(num_return_sequences, length)`."""
        from transformers import GenerationConfig

        config = GenerationConfig()
        for name, value in settings.items():
            setattr(config, name, value)
        # Where the config has None, `generate` takes the model's own value; only an argument can set None.
        model = self._model.generation_config
        none = {
            name: None for name, value in settings.items() if value is None and getattr(model, name, None) is not None
        }
        reader = {"tokenizer": self._tokenizer} if settings.get("stop_strings") else {}
        positions, limit = self._decoder_positions, settings.get("max_length")

        def seen(ids: Any) -> None:
            length = ids.shape[1]
            reached(length)
            if positions is not None and positions < length < (limit or length + 1):
                reason = f"the answer is longer than the {positions} tokens that the model can write"
                raise check.refuse("max_new_tokens", reason)

        criteria = each_token(cancellation, seen)
        return self._model.generate(**tensors, generation_config=config, stopping_criteria=criteria, **none, **reader)


def _since_4_50(version: str | None) -> bool:
    """Whether a `generation_config.json` of that version falls back on the model's values (true without a version)."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= (4, 50)


def _language_codes(tokenizer: Any) -> set[str]:
    """The codes for which `tokenizer` has tokens (mBART, M2M100, NLLB, PLBart, SeamlessM4T)."""
    table = getattr(tokenizer, "lang_code_to_id", None)
    if table is None:
        roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        table = set(tokenizer.all_special_tokens) - {getattr(tokenizer, f"{role}_token", None) for role in roles}
    if hasattr(tokenizer, "get_lang_id"):  # M2M100 keeps its codes outside the vocabulary
        return set(table)
    return {code for code in table if tokenizer.convert_tokens_to_ids(code) not in (None, tokenizer.unk_token_id)}


@contextmanager
def _restored(tokenizer: Any) -> Iterator[None]:
    """Restores the tokenizer's languages, which building a translation's inputs changes."""
    before = {name: getattr(tokenizer, name, None) for name in sorted(_LANGUAGES)}
    try:
        yield
    finally:
        for name, value in before.items():
            if getattr(tokenizer, name, None) != value:
                setattr(tokenizer, name, value)


@contextmanager
def _blaming(asked: Mapping[str, Any]) -> Iterator[None]:
    """Turns `generate`'s refusal of a parameter into one that names it; other errors pass."""
    try:
        yield
    except (ValueError, TypeError) as error:
        message = str(error)
        # By the parameter's name that comes first, or by the last word of one: `penalty` for repetition_penalty.
        named = {found.start(): name for name in asked if (found := re.search(rf"\b{name}\b", message))}
        ends = re.findall(r"`(\w+)`", message)
        meant = (
            name for name in asked if any(name.endswith(f"_{end}") for end in ends) and str(asked[name]) in message
        )
        blamed = named[min(named)] if named else next(meant, None)
        if blamed is None:
            raise
        raise InvalidRequest(f"Invalid value for field '{blamed}': {error}", blamed) from error
