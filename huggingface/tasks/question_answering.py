"""question-answering: the stretch of a text that answers a question, as transformers 4.57.6's pipeline found it.

transformers 5 removed that pipeline; here is its behaviour, on the model and tokenizer that are handed in and are
never changed. Called on the model's worker thread, the only one that may use this tokenizer meanwhile.
Must not know HTTP, the registry, nor how the model was loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Cancelled, InvalidRequest, UnknownField
from . import inputs as check
from .positions import max_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PADDING = (True, False, "longest", "max_length", "do_not_pad")
_CONTEXT = "context"


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class _Options:
    """The parameters, with 4.57.6's defaults; `None` means: worked out from the tokenizer."""

    top_k: int = 1
    max_answer_len: int = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    padding: bool | str = "do_not_pad"
    doc_stride: int | None = None
    max_seq_len: int | None = None
    max_question_len: int | None = None


@dataclass(frozen=True, slots=True)
class _Example:
    field: str
    question: str
    context: str


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the context together with the question, as the model reads it.

    `tensors`: the model's inputs, (1, length) each; `closed`: (1, length), 1 where no answer may begin or end;
    `characters(first, last)` gives the characters of the context, begin and end, that two tokens enclose.
    """

    tensors: Mapping[str, Any]
    closed: NDArray[np.int64]
    attention: NDArray[np.int64] | None
    characters: Callable[[int, int], tuple[int, int, str]]
    merges: bool


class QuestionAnswering:
    """`QuestionAnswering(model, tokenizer)({"question": ..., "context": ...})`.

    `model` is a `PreTrainedModel` with a question-answering head (start and end logits), on any device; `tokenizer`
    its own. `cancelled` is asked before each piece of each context. Behaves as 4.57.6's `QuestionAnsweringPipeline`.
    """

    def __init__(self, model: Any, tokenizer: Any, cancelled: Callable[[], bool] = _never) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cancelled = cancelled
        self._accepted = inspect.signature(model.forward).parameters

    def __call__(self, inputs: Any, *, cancelled: Callable[[], bool] | None = None, **parameters: Any) -> Any:
        """Answer one `{"question", "context"}` or a list of them; `question` alone or both may be lists of texts.

        Returns `{"score", "start", "end", "answer"}` for one question: `score` a probability, `start` and `end`
        characters of the context; a list of these, best first, where `top_k` gives several (or none); for several
        questions a list of either. Parameters: `top_k`, `max_answer_len`, `max_seq_len`, `doc_stride` (all in tokens
        but the first), `handle_impossible_answer`, `align_to_words`, `padding`, `max_question_len`.

        Raises:
            InvalidRequest: naming the part of `inputs` or the parameter that cannot be honoured.
            Cancelled: once `cancelled` answers True.
        """
        options = _options(parameters)
        examples = _examples(inputs)
        stop = cancelled or self._cancelled
        answers = [self._answer(example, options, stop) for example in examples]
        return answers[0] if len(answers) == 1 else answers

    def _answer(self, example: _Example, options: _Options, cancelled: Callable[[], bool]) -> Any:
        """The best answers over all pieces of one context (4.57.6: `QuestionAnsweringPipeline.postprocess`)."""
        answers: list[dict[str, Any]] = []
        null_score = 1000000.0
        # Some candidates fall together once they are widened to words.
        wanted = options.top_k * 2 + 10 if options.align_to_words else options.top_k
        for piece in self._pieces(example, options):
            if cancelled():
                raise Cancelled
            start, end = self._probabilities(piece)
            if options.handle_impossible_answer:
                null_score = min(null_score, (start[0, 0] * end[0, 0]).item())
            start[0, 0] = end[0, 0] = 0.0
            for first, last, score in _spans(start, end, _open(piece), wanted, options.max_answer_len):
                begin, stop, text = piece.characters(first, last)
                same = (answer for answer in answers if answer["answer"].lower() == text.lower())
                known = next(same, None) if piece.merges else None
                if known is None:
                    answers.append({"score": score, "start": begin, "end": stop, "answer": text})
                else:
                    known["score"] += score
        if options.handle_impossible_answer:
            answers.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
        best = sorted(answers, key=lambda answer: answer["score"], reverse=True)[: options.top_k]
        return best[0] if len(best) == 1 else best

    def _probabilities(self, piece: _Piece) -> tuple[NDArray[Any], NDArray[Any]]:
        """How likely each token is to begin and to end the answer, (1, length) each; closed tokens have no part."""
        import numpy as np
        import torch

        tensors = {name: value.to(self._model.device) for name, value in piece.tensors.items()}
        length = int(tensors["input_ids"].shape[-1])
        limit = max_positions(self._model)
        if limit is not None and length > limit:
            reason = f"makes pieces of {length} tokens, and the model reads at most {limit}"
            raise check.refuse("max_seq_len", reason)
        if "use_cache" in self._accepted:
            tensors["use_cache"] = False
        with torch.inference_mode():
            output = self._model(**tensors)
        shut = _open(piece) == 0
        both = []
        for logits in (output["start_logits"], output["end_logits"]):
            exact = logits.float() if logits.dtype == torch.bfloat16 else logits  # NumPy has no bfloat16
            masked = np.where(shut, -10000.0, exact.cpu().numpy())
            weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
            both.append(weights / weights.sum())
        return both[0], both[1]

    # The pieces of a context -----------------------------------------------------------------------------------------

    def _pieces(self, example: _Example, options: _Options) -> Iterator[_Piece]:
        """The context in pieces that fit the model; neighbours share `doc_stride` tokens (4.57.6: `preprocess`)."""
        import numpy as np
        import torch

        tokenizer = self._tokenizer
        longest = options.max_seq_len
        if longest is None:
            longest = min(tokenizer.model_max_length, 384)
        shared = min(longest // 2, 128) if options.doc_stride is None else options.doc_stride
        if shared > longest:
            raise check.refuse("doc_stride", f"{shared} is larger than max_seq_len, {longest}")
        self._check_room(example, options, longest, shared)
        question_first = tokenizer.padding_side == "right"
        texts = (example.question, example.context) if question_first else (example.context, example.question)
        try:
            encoded = tokenizer(
                text=texts[0],
                text_pair=texts[1],
                padding=options.padding,
                truncation="only_second" if question_first else "only_first",
                max_length=longest,
                stride=shared,
                return_token_type_ids=True,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        except ValueError as error:
            if options.padding in (False, "do_not_pad"):
                raise
            raise check.refuse("padding", str(error)) from error
        for index, ids in enumerate(encoded["input_ids"]):
            row = np.array(ids)
            sequences = encoded.sequence_ids(index)
            # Left-padding tokenizers put the context first, and there every token is open.
            closed = np.array([int(question_first and part != 1) for part in sequences])
            if tokenizer.cls_token_id is not None:  # models that know "no answer" say so by this token
                closed[row == tokenizer.cls_token_id] = 0
            names = [name for name in tokenizer.model_input_names if name in self._accepted]
            padded = int((row == tokenizer.pad_token_id).sum()) if tokenizer.padding_side == "left" else 0
            attention = encoded.get("attention_mask")
            yield _Piece(
                tensors={name: torch.tensor([encoded[name][index]]) for name in names},
                closed=closed[None],
                attention=None if attention is None else np.array([attention[index]]),
                characters=_locate(encoded[index], example.context, question_first, padded, options.align_to_words),
                merges=True,
            )

    def _check_room(self, example: _Example, options: _Options, longest: int, shared: int) -> None:
        """Refuse lengths that leave no room for the context: the tokenizer would not raise, but abort the thread."""
        question = len(self._tokenizer(example.question, add_special_tokens=False)["input_ids"])
        if options.max_question_len is not None and question > options.max_question_len:
            reason = f"the question has {question} tokens, and questions are never cut; send a shorter one"
            raise check.refuse("max_question_len", reason)
        room = longest - question - self._tokenizer.num_special_tokens_to_add(pair=True)
        if shared < room:
            return
        context = len(self._tokenizer(example.context, add_special_tokens=False)["input_ids"])
        if context <= room:
            return
        if room <= 0:
            question_field = f"{example.field}.question"
            raise check.refuse(
                question_field, f"has {question} tokens, which leaves no room in a max_seq_len of {longest}"
            )
        field = f"{example.field}.question" if options.doc_stride is None else "doc_stride"
        reason = f"pieces hold {room} tokens of the context, and must hold more than the {shared} that they share"
        raise check.refuse(field, reason)


# Tokens and characters ------------------------------------------------------------------------------------------------


def _locate(
    encoding: Any, context: str, question_first: bool, padded: int, align_to_words: bool
) -> Callable[[int, int], tuple[int, int, str]]:
    """How to find the characters between two tokens of a piece (4.57.6: `get_indices`)."""
    sequence = 1 if question_first else 0

    def words(first: int, last: int) -> tuple[int, int] | None:
        """The characters of the words that the tokens belong to; None where the tokenizer has no words there."""
        spans = []
        for token in (first, last):
            word = encoding.token_to_word(token)
            span = None if word is None else encoding.word_to_chars(word, sequence_index=sequence)
            if span is None:
                return None
            spans.append(span)
        return spans[0][0], spans[1][1]

    def characters(first: int, last: int) -> tuple[int, int, str]:
        first, last = first - padded, last - padded
        found = words(first, last) if align_to_words and first >= 0 else None
        begin, end = found or (encoding.offsets[first][0], encoding.offsets[last][1])
        return begin, end, context[begin:end]

    return characters


def _open(piece: _Piece) -> NDArray[np.int64]:
    """(1, length): 1 where an answer may begin or end, 0 elsewhere."""
    opened: NDArray[np.int64] = 1 - piece.closed
    return opened if piece.attention is None else opened & piece.attention


def _spans(
    start: NDArray[Any], end: NDArray[Any], opened: NDArray[np.int64], count: int, max_answer_len: int
) -> list[tuple[int, int, float]]:
    """The `count` likeliest (first token, last token, score), best first (4.57.6: `decode_spans`).

    Candidates that end before they begin or are longer than `max_answer_len` tokens have no score. Those outside the
    open tokens are left out after the count was taken; token 0 is never left out.
    """
    import numpy as np

    scores = np.tril(np.triu(np.matmul(start[..., None], end[:, None, :])), max_answer_len - 1)
    flat = scores.flatten()
    if count == 1:
        order = np.array([np.argmax(flat)])
    elif len(flat) < count:
        order = np.argsort(-flat)
    else:
        best = np.argpartition(-flat, count)[:count] if count < len(flat) else np.arange(len(flat))
        order = best[np.argsort(-flat[best])]
    firsts, lasts = np.unravel_index(order, scores.shape)[1:]
    kept = np.isin(firsts, opened.nonzero()) & np.isin(lasts, opened.nonzero())
    return [
        (int(first), int(last), scores[0, first, last].item())
        for first, last in zip(firsts[kept], lasts[kept], strict=True)
    ]


# What is asked for ----------------------------------------------------------------------------------------------------


def _options(parameters: Mapping[str, Any]) -> _Options:
    known = _Options.__dataclass_fields__
    for name, value in parameters.items():
        if name not in known:
            raise UnknownField(name, known)
        if name in ("handle_impossible_answer", "align_to_words"):
            if value is not None and not isinstance(value, bool):
                raise check.refuse(name, "must be true or false")
        elif name == "padding":
            if value is not None and not (isinstance(value, bool | str) and value in _PADDING):
                raise check.refuse(name, "must be one of true, false, longest, max_length, do_not_pad")
        elif value is not None:
            least = 0 if name == "doc_stride" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise check.refuse(name, f"must be a whole number of at least {least}")
    return _Options(**{name: value for name, value in parameters.items() if value is not None})


def _examples(inputs: Any) -> list[_Example]:
    """The questions asked, one by one (4.57.6: `QuestionAnsweringArgumentHandler`)."""
    if isinstance(inputs, list):
        if not inputs:
            raise check.refuse("inputs", "must not be empty")
        return [_example(item, f"inputs.{index}") for index, item in enumerate(inputs)]
    _check_keys(inputs, "inputs")
    question, context = inputs["question"], inputs[_CONTEXT]
    if not isinstance(question, list):
        return [_example(inputs, "inputs")]
    contexts = context if isinstance(context, list) else [context] * len(question)
    if not question:
        raise check.refuse("inputs.question", "must not be empty")
    if len(question) != len(contexts):
        raise check.refuse("inputs.context", f"must be as many as the questions: {len(question)}, not {len(contexts)}")
    return [
        _Example(
            "inputs",
            check.text(asked, f"inputs.question.{index}", empty=False),
            check.text(read, f"inputs.context.{index}" if isinstance(context, list) else "inputs.context", empty=False),
        )
        for index, (asked, read) in enumerate(zip(question, contexts, strict=True))
    ]


def _example(item: Any, field: str) -> _Example:
    _check_keys(item, field)
    question = check.text(item["question"], f"{field}.question", empty=False)
    return _Example(field, question, check.text(item[_CONTEXT], f"{field}.{_CONTEXT}", empty=False))


def _check_keys(item: Any, field: str) -> None:
    if not isinstance(item, dict):
        raise check.refuse(field, 'must be {"question": ..., "context": ...}')
    for key in ("question", _CONTEXT):
        if key not in item:
            raise InvalidRequest(f"Missing required field: {field}.{key}", f"{field}.{key}")
    for key in item:
        if key not in ("question", _CONTEXT):
            raise check.refuse(f"{field}.{key}", "is not one of 'question' and 'context'")
