"""The parameters of generation and of each task: names, types, ranges and meanings.

Owns one pydantic model for each task, which also becomes OpenAPI, and the translation of pydantic's errors into the
project's. Plain data, safe from any thread. A parameter is listed only if transformers 5.23 honours it and JSON can
carry it; any other name is refused. Must not know models, tokenizers, torch or HTTP.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..http.fields import Fields
from ..http.validation import request_error

_LARGEST = 2**31 - 1  # no model has a larger length, count or token id
_MAX_SEQUENCES = 1024  # each one multiplies the memory of a step

Count = Annotated[int, Field(ge=1, le=_LARGEST)]
TokenId = Annotated[int, Field(ge=0, le=_LARGEST)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]  # JSON has no other keys than strings
Bias = Annotated[float, Field(ge=-100, le=100)]
AnyText = Annotated[str, Field(min_length=0)]  # a bare `str` would accept text without a UTF-8 form
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
# Matching a stop string costs a pass over the vocabulary for each of its characters.
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(min_length=1, max_length=64)]


def _maybe(description: str, **constraints: Any) -> Any:
    """An optional parameter; `None`, or null in a body, means that it is not given."""
    return Field(default=None, description=description, **constraints)


def _refuse(field: str, reason: str) -> PydanticCustomError:
    """The error of a rule over several fields; `request_error` reads the `field` that it names."""
    return PydanticCustomError("rule", "{reason}", {"field": field, "reason": reason})


class Parameters(Fields):
    """The base of all parameter models: strict types, no unknown names, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class CommonGeneration(Parameters):
    """The parameters that transformers' `generate` honours for every model that generates text."""

    beams: ClassVar[int] = 1  # the default number of beams

    max_new_tokens: int = _maybe("Most tokens to generate, prompt not counted.", ge=1, le=_LARGEST)
    max_length: int = _maybe("Most tokens in total: prompt and new ones, or a decoder's output.", ge=1, le=_LARGEST)
    min_new_tokens: int = _maybe("No end of text before this many new tokens.", ge=0, le=_LARGEST)
    min_length: int = _maybe("No end of text before this length, as `max_length`.", ge=0, le=_LARGEST)
    max_time: float = _maybe("Seconds after which no further token is begun.", gt=0)
    stop_strings: Stop | Stops = _maybe("Text, or several, at which generation stops; it is kept.")
    eos_token_id: TokenId | TokenIds = _maybe("Token, or several, at which generation stops.")
    do_sample: bool = _maybe("Sample each token at random by its probability; false takes the likeliest.")
    temperature: float = _maybe("Below 1 sharpens, above 1 flattens the choice; 0 is greedy.", ge=0)
    top_k: int = _maybe("Sample among this many likeliest tokens; 0 is no limit.", ge=0, le=_LARGEST)
    top_p: float = _maybe("Sample among the likeliest tokens that add up to this share.", gt=0, le=1)
    min_p: float = _maybe("Sample among tokens at least this share of the likeliest one.", ge=0, le=1)
    top_h: float = _maybe("Sample among tokens that keep this share of the entropy.", gt=0, le=1)
    typical_p: float = _maybe("Sample among the most typical tokens up to this share.", gt=0, le=1)
    epsilon_cutoff: float = _maybe("Never sample a token less likely than this; 0 is off.", ge=0, lt=1)
    eta_cutoff: float = _maybe("As `epsilon_cutoff`, adapted to the entropy; 0 is off.", ge=0, lt=1)
    repetition_penalty: float = _maybe("Above 1 makes tokens that were seen less likely.", gt=0)
    encoder_repetition_penalty: float = _maybe("Above 1 favours the tokens of the prompt.", gt=0)
    no_repeat_ngram_size: int = _maybe("No run of this many tokens comes twice.", ge=0, le=_LARGEST)
    encoder_no_repeat_ngram_size: int = _maybe(
        "No run of this many tokens is copied from the prompt.", ge=0, le=_LARGEST
    )
    bad_words_ids: list[TokenIds] = _maybe("Runs of tokens that are never generated.", min_length=1)
    suppress_tokens: TokenIds = _maybe("Tokens that are never generated.")
    begin_suppress_tokens: TokenIds = _maybe("Tokens that are never generated first.")
    forced_eos_token_id: TokenId | TokenIds = _maybe("Token forced when the length limit is reached.")
    sequence_bias: list[list[TokenIds | float]] = _maybe(
        "Pairs `[[token, …], bias]`: bias added where the run is completed.", min_length=1
    )
    exponential_decay_length_penalty: list[int | float] = _maybe(
        "`[start, factor]`: after `start` new tokens the end grows likelier by `factor` each.",
        min_length=2,
        max_length=2,
    )
    renormalize_logits: bool = _maybe("Make probabilities add up to 1 again after the other rules.")
    num_beams: int = _maybe("Beams of a beam search; 1 is none.", ge=1, le=_MAX_SEQUENCES)
    length_penalty: float = _maybe("Above 0 favours longer beams, below 0 shorter.", ge=-100, le=100)
    early_stopping: bool | Literal["never"] = _maybe("When a beam search may stop.")
    num_return_sequences: int = _maybe("How many texts to return.", ge=1, le=_MAX_SEQUENCES)

    @field_validator("temperature", "repetition_penalty", "encoder_repetition_penalty")
    @classmethod
    def _within_float32(cls, value: float) -> float:
        # Logits are divided by these: beyond float32's range they become NaN, which on a GPU ends the whole process.
        if value != 0 and not 1e-4 <= value <= 1e4:
            raise ValueError("must lie between 0.0001 and 10000")
        return value

    @field_validator("sequence_bias")
    @classmethod
    def _bias_pairs(cls, value: list[list[Any]]) -> list[list[Any]]:
        for pair in value:
            if len(pair) != 2 or not isinstance(pair[0], list) or isinstance(pair[1], list):
                raise ValueError("must hold pairs [[token, ...], bias]")
            if abs(pair[1]) > 1e6:
                raise ValueError("must hold biases between -1000000 and 1000000")
        return value

    @field_validator("exponential_decay_length_penalty")
    @classmethod
    def _decay_pair(cls, value: list[int | float]) -> list[int | float]:
        start, factor = value
        if not isinstance(start, int) or not 0 <= start <= _LARGEST:
            raise ValueError("must begin with a whole number of tokens, at least 0")
        if not 0 < factor <= 2:
            raise ValueError("must end with a factor greater than 0 and at most 2")
        return [start, float(factor)]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.max_length is not None and self.max_new_tokens is not None:
            raise _refuse("max_length", "cannot be given together with max_new_tokens")
        if self.min_length is not None and self.min_new_tokens is not None:
            raise _refuse("min_length", "cannot be given together with min_new_tokens")
        for least, maximum in (
            ("min_new_tokens", "max_new_tokens"),
            ("min_new_tokens", "max_length"),
            ("min_length", "max_length"),
        ):
            low, high = getattr(self, least), getattr(self, maximum)
            if low is not None and high is not None and low > high:
                raise _refuse(least, f"must not exceed {maximum} ({high})")
        return self

    @model_validator(mode="after")
    def _sequences_can_differ(self) -> Self:
        wanted, beams = self.num_return_sequences or 1, self.num_beams or self.beams
        if beams > 1 and wanted > beams:
            raise _refuse("num_return_sequences", f"must not exceed num_beams ({beams})")
        if beams == 1 and wanted > 1 and (self.do_sample is False or self.temperature == 0):
            raise _refuse("num_return_sequences", "must be 1 without sampling or beams, which give a single answer")
        return self

    @model_validator(mode="after")
    def _forced_not_suppressed(self) -> Self:
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name, None)
            tokens = {forced} if isinstance(forced, int) else set(forced or ())
            if tokens and tokens <= set(self.suppress_tokens or ()):
                raise _refuse(name, "must not be among suppress_tokens")
        return self


class GenerationParameters(CommonGeneration):
    """The parameters of `/generate`, and of a registered model's defaults."""

    stop_strings: Stop | Stops = _maybe("Text, or several, at which generation stops; it is left out of the answer.")
    forced_bos_token_id: TokenId = _maybe("First token of the answer (encoder-decoder models only).")
    guidance_scale: float = _maybe("Above 1 binds the text to the prompt (decoder-only models).", ge=1, le=100)
    presence_penalty: float = _maybe(
        "Subtracted from the logit of every token generated so far, prompt not counted.", ge=-2, le=2
    )
    frequency_penalty: float = _maybe("The same, for each time that the token was generated.", ge=-2, le=2)
    repeat_last_n: int = _maybe(
        "How many of the last tokens these two and `repetition_penalty` apply to; -1 is all of them, 0 none.",
        ge=-1,
        le=_LARGEST,
    )
    logit_bias: dict[TokenKey, Bias] = _maybe('Added to the logits of tokens: `{"token id": bias}`.', min_length=1)
    seed: int = _maybe("Seed of the sampling, so that an answer can be repeated.", ge=0, lt=2**63)
    stop_token_ids: TokenIds = _maybe("Tokens at which generation stops besides the end-of-text tokens.")
    ignore_eos: bool = _maybe("Continue after the end-of-text token, up to the length limit or another stop.")


class TextGenerationParameters(CommonGeneration):
    """`text-generation`: continues a text, or answers a chat."""

    guidance_scale: float = _maybe("Above 1 binds the text more closely to the prompt.", ge=1, le=100)
    return_full_text: bool = _maybe("Return the prompt and the new text (default), or only the new text.")
    prefix: AnyText = _maybe("Text put before each prompt; it is not part of the answer.")
    stop_sequence: Stop | Stops = _maybe("The same as `stop_strings`.")
    truncation: bool = _maybe("Cut a prompt that is longer than the tokenizer's limit.")
    handle_long_generation: Literal["hole"] = _maybe(
        "`hole`: drop the start of a prompt that leaves no room for the new tokens."
    )
    add_special_tokens: bool = _maybe("Whether the tokenizer adds its special tokens to a plain prompt.")
    skip_special_tokens: bool = _maybe("Leave special tokens out of the answer (default).")
    clean_up_tokenization_spaces: bool = _maybe("Remove the spaces that tokens leave before punctuation.")
    continue_final_message: bool = _maybe("Chats only: continue the last message instead of a new turn.")

    @model_validator(mode="after")
    def _one_way_to_stop(self) -> Self:
        if self.stop_sequence is not None and self.stop_strings is not None:
            raise _refuse("stop_sequence", "cannot be given together with stop_strings, which means the same")
        return self


class Text2TextParameters(CommonGeneration):
    """`text2text-generation` and `summarization`: from one text to another."""

    beams: ClassVar[int] = 4

    forced_bos_token_id: TokenId = _maybe("First token of the answer.")
    decoder_start_token_id: TokenId = _maybe("Token that the decoder starts from.")
    truncation: bool = _maybe("Cut an input that is longer than the tokenizer's limit.")
    clean_up_tokenization_spaces: bool = _maybe("Remove the spaces that tokens leave before punctuation.")
    prefix: AnyText = _maybe("Text put before each input, in place of the model's own prefix for the task.")
    stop_sequence: Stop = _maybe("Stop at the first token of this text.")


class TranslationParameters(Text2TextParameters):
    """`translation`: from one language to another."""

    src_lang: Text = _maybe("Language of the input, as the tokenizer codes it (`eng_Latn`, `en_XX`, `en`).")
    tgt_lang: Text = _maybe("Language of the answer, as the tokenizer codes it.")


class QuestionAnsweringParameters(Parameters):
    """`question-answering`: finds the answer in a context."""

    top_k: Count = _maybe("How many answers to return.")
    doc_stride: int = _maybe("Tokens that two pieces of a long context share.", ge=0, le=_LARGEST)
    max_answer_len: Count = _maybe("Longest answer, in tokens.")
    max_seq_len: Count = _maybe("Longest piece, question and context together, in tokens.")
    max_question_len: Count = _maybe("Longest question, in tokens; a longer one is refused.")
    handle_impossible_answer: bool = _maybe("Allow the empty answer.")
    align_to_words: bool = _maybe("Widen an answer to whole words.")


class TokenizerArguments(Parameters):
    """How the tokenizer reads an input."""

    truncation: bool = _maybe("Cut an input that is too long.")
    max_length: Count = _maybe("Longest input in tokens; the rest is cut.")
    add_special_tokens: bool = _maybe("Whether the tokenizer adds its special tokens.")

    @model_validator(mode="after")
    def _cut_is_wanted(self) -> Self:
        if self.max_length is not None and self.truncation is False:
            raise _refuse("max_length", "cannot be given together with truncation false")
        return self


class FillMaskParameters(Parameters):
    """`fill-mask`: finds words for the mask."""

    top_k: Count = _maybe("How many candidates to return (default 5).")
    targets: Text | Texts = _maybe("Score only these; one not in the vocabulary counts as its first token.")
    tokenizer_kwargs: TokenizerArguments = _maybe("How the tokenizer reads the text.", strict=False)


class TextClassificationParameters(Parameters):
    """`text-classification`: labels a text, or a pair of texts."""

    nulls = frozenset({"top_k"})

    top_k: Count | None = _maybe("How many labels to return; null returns all.")
    function_to_apply: Literal["sigmoid", "softmax", "none"] = _maybe("How logits become scores.")
    truncation: bool = _maybe("Cut a text that is longer than the tokenizer's limit.")
    max_length: Count = _maybe("Longest text in tokens; the rest is cut.")

    @model_validator(mode="after")
    def _cut_is_wanted(self) -> Self:
        if self.max_length is not None and self.truncation is False:
            raise _refuse("max_length", "cannot be given together with truncation false")
        return self


class TokenClassificationParameters(Parameters):
    """`token-classification`: labels the tokens of a text, such as the names in it."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = _maybe(
        "How tokens are joined into entities."
    )
    ignore_labels: list[AnyText] = _maybe('Labels left out of the answer (default `["O"]`).')
    stride: int = _maybe("Split a long text; neighbouring pieces share this many tokens.", ge=0, le=_LARGEST)
    is_split_into_words: bool = _maybe("Each input is a list of words.")
    delimiter: AnyText = _maybe("Text between words that are given as a list (default: a space).")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stride is not None and self.aggregation_strategy == "none":
            raise _refuse("stride", "needs an aggregation_strategy other than 'none'")
        if self.delimiter is not None and not self.is_split_into_words:
            raise _refuse("delimiter", "needs is_split_into_words")
        return self


class ZeroShotParameters(Parameters):
    """`zero-shot-classification`: finds which of your own labels fits a text."""

    candidate_labels: Text | Texts = Field(description="The labels: a list, or one text with commas between them.")
    hypothesis_template: Text = _maybe("Sentence with {} where the label goes.")
    multi_label: bool = _maybe("Score each label by itself; several may be true.")

    @field_validator("candidate_labels")
    @classmethod
    def _some_label(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and not any(label.strip() for label in value.split(",")):
            raise ValueError("must hold at least one label")
        return value

    @field_validator("hypothesis_template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        try:
            fields = [field for field in string.Formatter().parse(value) if field[1] is not None]
        except ValueError:
            fields = []
        # Only a bare {}: a format string could otherwise reach into Python's own objects.
        if len(fields) != 1 or any(fields[0][1:]):
            raise ValueError("must contain {} exactly once, where the label goes, and no other braces")
        return value


class FeatureExtractionParameters(Parameters):
    """`feature-extraction`: the model's last hidden states."""

    truncation: bool = _maybe("Cut a text that is longer than the tokenizer's limit.")
    tokenize_kwargs: TokenizerArguments = _maybe("How the tokenizer reads the text.", strict=False)

    @model_validator(mode="after")
    def _truncation_once(self) -> Self:
        if self.truncation is not None and self.tokenize_kwargs is not None:
            if self.tokenize_kwargs.truncation is not None:
                raise _refuse("truncation", "is given twice, here and in tokenize_kwargs")
            if self.truncation is False and self.tokenize_kwargs.max_length is not None:
                raise _refuse("truncation", "must not be false where tokenize_kwargs gives a max_length")
        return self


class TableQuestionAnsweringParameters(Parameters):
    """`table-question-answering`: answers from the cells of a table."""

    sequential: bool = _maybe("Read the queries as one conversation; each sees the answers before it.")
    truncation: bool | Literal["drop_rows_to_fit", "do_not_truncate"] = _maybe(
        "Whether rows that do not fit the model are dropped (the default)."
    )


TASK_PARAMETERS: Mapping[str, type[Parameters]] = MappingProxyType(
    {
        "text-generation": TextGenerationParameters,
        "text2text-generation": Text2TextParameters,
        "summarization": Text2TextParameters,
        "translation": TranslationParameters,
        "question-answering": QuestionAnsweringParameters,
        "fill-mask": FillMaskParameters,
        "text-classification": TextClassificationParameters,
        "token-classification": TokenClassificationParameters,
        "zero-shot-classification": ZeroShotParameters,
        "feature-extraction": FeatureExtractionParameters,
        "table-question-answering": TableQuestionAnsweringParameters,
    }
)


def validate(
    model_cls: type[BaseModel], values: Mapping[str, Any], prefix: AnyText = "", *, lasts: bool = False
) -> dict[str, Any]:
    """Checks `values` against `model_cls`; returns the given ones as plain JSON values.

    `prefix` goes before a field's name in messages (`parameters.` gives `parameters.top_p`). For stored values
    (`lasts`), unknown names are refused even where the server's setting accepts them in requests.

    Raises:
        MissingField, UnknownField, InvalidRequest: for the first problem, in that order; each names the field.
    """
    try:
        model = model_cls.model_validate(dict(values), context={"prefix": prefix, "lasts": lasts})
    except ValidationError as error:
        known = model_cls.model_fields
        raise request_error(error, prefix, known, frozenset(known)) from None
    return model.model_dump(exclude_unset=True)
