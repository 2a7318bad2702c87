"""question-answering: finds the span of a text that answers a question, as transformers 4.57.6's pipeline did.

transformers 5 removed that pipeline; this module has its behaviour, and never changes the given model and tokenizer.
Called on the model's engine thread, which alone uses this tokenizer meanwhile. Must not know HTTP, the registry, or how
the model was loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cancellation import NEVER, Cancellation
from ..errors import InvalidRequest, UnknownField
from . import inputs as check
from .context_pieces import ContextPiece, Example, PieceOptions, pieces
from .json_values import json_value
from .padded_batch import Lane, Outputs, Tensors
from .positions import max_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PADDING = (True, False, "longest", "max_length", "do_not_pad")
_CONTEXT = "context"


class QuestionAnswering:
    """`QuestionAnswering(model, tokenizer)({"question": ..., "context": ...})`.

    `model` is a `PreTrainedModel` with a question-answering head (start and end logits), on any device; `tokenizer`
    its own. Behaves as 4.57.6's `QuestionAnsweringPipeline`.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        accepted = inspect.signature(model.forward).parameters
        self._names = [name for name in _input_names(tokenizer) if name in accepted]
        self._segments = getattr(model.config, "type_vocab_size", 2) != 1
        self._limit = max_positions(model)
        self.lane = Lane(
            model,
            tokenizer,
            ("start_logits", "end_logits"),
            device=model.device,
            per_token=True,
            fixed={"use_cache": False} if "use_cache" in accepted else {},
        )

    def __call__(self, inputs: Any, *, cancellation: Cancellation = NEVER, **parameters: Any) -> Any:
        """Answers one `{"question", "context"}` or a list of them; `question` alone or both may be lists of texts.

        Returns `{"score", "start", "end", "answer"}` for one question: `score` is a probability, `start` and `end` are
        characters of the context; a list of these, best first, where `top_k` gives several (or none); for several
        questions a list of either. Parameters: `top_k`, `max_answer_len`, `max_seq_len`, `doc_stride` (all in tokens
        but the first), `handle_impossible_answer`, `align_to_words`, `padding`, `max_question_len`.

        Raises:
            InvalidRequest: names the part of `inputs` or the parameter that cannot be honoured.
            Cancelled: by `cancellation`, which is checked before each piece of each context.
        """
        options = _options(parameters)
        examples = _examples(inputs)
        answers = [self.best(self._read(example, options, cancellation), options) for example in examples]
        return answers[0] if len(answers) == 1 else answers

    def _read(
        self, example: Example, options: PieceOptions, cancellation: Cancellation
    ) -> Iterator[tuple[ContextPiece, Outputs]]:
        for piece in self.pieces(example, options):
            cancellation.check()
            try:
                outputs = self.lane.run_alone(piece.tensors)
            except IndexError as error:
                raise self.blame(error, _tokens(piece)) from error
            yield piece, outputs

    def pieces(self, example: Example, options: PieceOptions) -> Iterator[ContextPiece]:
        """The pieces of one context, none longer than the model can read."""
        for piece in pieces(self._tokenizer, self._names, self._segments, example, options):
            length = _tokens(piece)
            if self._limit is not None and length > self._limit:
                reason = f"makes pieces of {length} tokens, and the model reads at most {self._limit}"
                raise check.refuse("max_seq_len", reason)
            yield piece

    def blame(self, error: Exception, tokens: int) -> Exception:
        """Returns a refusal if the error means that the piece is too long, otherwise the error."""
        # A position or token outside the model's table.
        if not isinstance(error, IndexError) or "out of range in self" not in str(error):
            return error
        refusal = check.refuse("max_seq_len", f"makes pieces of {tokens} tokens, more than the model reads")
        refusal.__cause__ = error
        return refusal

    def best(self, read: Iterable[tuple[ContextPiece, Outputs]], options: PieceOptions) -> Any:
        """The best answers over all pieces of one context (4.57.6: `QuestionAnsweringPipeline.postprocess`).

        `read` has the pieces with their logits for the answer's start and end, (1, length) each.
        """
        answers: list[dict[str, Any]] = []
        null_score = 1000000.0
        # Some candidates become equal once they are widened to words.
        wanted = options.top_k * 2 + 10 if options.align_to_words else options.top_k
        for piece, (start_logits, end_logits) in read:
            start, end = _probabilities(piece, start_logits), _probabilities(piece, end_logits)
            if options.handle_impossible_answer:
                null_score = min(null_score, (start[0, 0] * end[0, 0]).item())
            start[0, 0] = end[0, 0] = 0.0
            for first, last, score in _spans(start, end, _open(piece), wanted, options.max_answer_len):
                place = piece.characters(first, last)
                if place is None:
                    continue
                begin, stop, text = place
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


class QuestionWork:
    """One call in rows, which are pieces of its contexts: a `batching.Work`."""

    def __init__(self, questions: QuestionAnswering, inputs: Any, parameters: Mapping[str, Any]) -> None:
        """`inputs` and `parameters` are those of `QuestionAnswering.__call__`."""
        self._questions = questions
        self._options = _options(parameters)
        self._examples = _examples(inputs)
        self.lane: Lane = questions.lane
        self.count = len(self._examples)

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The pieces of one context."""
        for piece in self._questions.pieces(self._examples[index], self._options):
            yield piece.tensors, piece

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> Any:
        """The best answers to one question."""
        return json_value(self._questions.best(rows, self._options))

    def whole(self, answers: list[Any]) -> Any:
        """One question's answers, or a list of several questions' answers."""
        return answers[0] if len(answers) == 1 else answers

    def blame(self, error: Exception, tokens: int) -> Exception:
        """A refusal if the model has no position for the last of the tokens; otherwise the error."""
        return self._questions.blame(error, tokens)


def _input_names(tokenizer: Any) -> list[str]:
    """The inputs that a model of this tokenizer's kind takes, as 4.57.6 counted them.

    A tokenizer that names none has those of the base class, which included `token_type_ids`.
    """
    names = list(tokenizer.model_input_names)
    bases = (cls for cls in type(tokenizer).__mro__ if not cls.__module__.startswith("transformers.tokenization_"))
    said = "model_input_names" in tokenizer.init_kwargs or any("model_input_names" in vars(cls) for cls in bases)
    return names if said or "token_type_ids" in names else [*names, "token_type_ids"]


# Tokens and scores ----------------------------------------------------------------------------------------------------


def _tokens(piece: ContextPiece) -> int:
    return int(piece.tensors["input_ids"].shape[-1])


def _probabilities(piece: ContextPiece, logits: Any) -> NDArray[Any]:
    """Each token's probability to begin, or to end, the answer, (1, length); closed tokens are left out."""
    import numpy as np
    import torch

    exact = logits.float() if logits.dtype == torch.bfloat16 else logits  # NumPy has no bfloat16
    masked = np.where(_open(piece) == 0, -10000.0, exact.numpy())
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    probabilities: NDArray[Any] = weights / weights.sum()
    return probabilities


def _open(piece: ContextPiece) -> NDArray[np.int64]:
    """(1, length): 1 where an answer may begin or end, 0 elsewhere."""
    opened: NDArray[np.int64] = 1 - piece.closed
    return opened if piece.attention is None else opened & piece.attention


def _spans(
    start: NDArray[Any], end: NDArray[Any], opened: NDArray[np.int64], count: int, max_answer_len: int
) -> list[tuple[int, int, float]]:
    """The `count` likeliest (first token, last token, score), best first (4.57.6: `decode_spans`).

    Candidates that end before they begin, or are longer than `max_answer_len` tokens, have no score. Those outside the
    open tokens are dropped after the count was taken; token 0 is never dropped.
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


# Inputs and parameters ------------------------------------------------------------------------------------------------


def _options(parameters: Mapping[str, Any]) -> PieceOptions:
    known = PieceOptions.__dataclass_fields__
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
    return PieceOptions(**{name: value for name, value in parameters.items() if value is not None})


def _examples(inputs: Any) -> list[Example]:
    """The questions, one by one (4.57.6: `QuestionAnsweringArgumentHandler`)."""
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
        Example(
            "inputs",
            check.text(asked, f"inputs.question.{index}", empty=False),
            check.text(read, f"inputs.context.{index}" if isinstance(context, list) else "inputs.context", empty=False),
        )
        for index, (asked, read) in enumerate(zip(question, contexts, strict=True))
    ]


def _example(item: Any, field: str) -> Example:
    _check_keys(item, field)
    question = check.text(item["question"], f"{field}.question", empty=False)
    return Example(field, question, check.text(item[_CONTEXT], f"{field}.{_CONTEXT}", empty=False))


def _check_keys(item: Any, field: str) -> None:
    if not isinstance(item, dict):
        raise check.refuse(field, 'must be {"question": ..., "context": ...}')
    for key in ("question", _CONTEXT):
        if key not in item:
            raise InvalidRequest(f"Missing required field: {field}.{key}", f"{field}.{key}")
    for key in item:
        if key not in ("question", _CONTEXT):
            raise check.refuse(f"{field}.{key}", "is not one of 'question' and 'context'")
