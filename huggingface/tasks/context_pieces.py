"""Cuts a question-answering model's long context into pieces, and maps tokens back to characters.

In two ways, as transformers 4.57.6: by the characters that a fast tokenizer keeps for each token, and by words for
tokenizers written in Python. Called on the engine's thread, which alone uses the tokenizer meanwhile. Must not know
models, scores or JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import inputs as check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Word separators of 4.57.6's SquadExample: not all that `str.split` uses.
_SPACES = " \t\r\n\u202f"


@dataclass(frozen=True, slots=True)
class PieceOptions:
    """The task's parameters with 4.57.6's defaults; None: derived from the tokenizer."""

    top_k: int = 1
    max_answer_len: int = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    padding: bool | str = "do_not_pad"
    doc_stride: int | None = None
    max_seq_len: int | None = None
    max_question_len: int | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one context; `field` is its place in the request."""

    field: str
    question: str
    context: str


@dataclass(frozen=True, slots=True)
class ContextPiece:
    """A part of the context together with the question, as the model reads it.

    Attributes:
        tensors: the model's inputs, (1, length) each, on the CPU.
        closed: (1, length), 1 where no answer may begin or end.
        attention: (1, length), 0 for padding.
        characters: for a first and a last token, where their text begins and ends in the context, and the text; None
            where the tokens stand for no text.
        merges: equal answers are merged.
    """

    tensors: Mapping[str, Any]
    closed: NDArray[np.int64]
    attention: NDArray[np.int64] | None
    characters: Callable[[int, int], tuple[int, int, str] | None]
    merges: bool


def pieces(
    tokenizer: Any, names: Sequence[str], segments: bool, example: Example, options: PieceOptions
) -> Iterator[ContextPiece]:
    """Cuts `example` into pieces of at most `max_seq_len` tokens (4.57.6: `QuestionAnsweringPipeline.preprocess`).

    `names` are the inputs that the model takes; `segments`: it distinguishes two texts. Neighbours share `doc_stride`
    tokens; with a tokenizer written in Python they begin `doc_stride` tokens apart.

    Raises:
        InvalidRequest: the lengths leave no room for the context.
    """
    longest = options.max_seq_len
    if longest is None:
        longest = min(tokenizer.model_max_length, 384)
    stride = min(longest // 2, 128) if options.doc_stride is None else options.doc_stride
    if stride > longest:
        raise check.refuse("doc_stride", f"{stride} is larger than max_seq_len, {longest}")
    if tokenizer.is_fast:
        return _by_characters(tokenizer, names, example, options, longest, stride)
    return _by_words(tokenizer, names, segments, example, options, longest, stride)


# By characters --------------------------------------------------------------------------------------------------------


def _by_characters(
    tokenizer: Any, names: Sequence[str], example: Example, options: PieceOptions, longest: int, shared: int
) -> Iterator[ContextPiece]:
    import numpy as np
    import torch

    _check_room(tokenizer, example, options, longest, shared)
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
        # Tokenizers that pad on the left put the context first, and every token there is open.
        closed = np.array([int(question_first and part != 1) for part in sequences])
        if tokenizer.cls_token_id is not None:  # models that know "no answer" express it by this token
            closed[row == tokenizer.cls_token_id] = 0
        padded = int((row == tokenizer.pad_token_id).sum()) if tokenizer.padding_side == "left" else 0
        attention = encoded.get("attention_mask")
        yield ContextPiece(
            tensors={name: torch.tensor([encoded[name][index]]) for name in names},
            closed=closed[None],
            attention=None if attention is None else np.array([attention[index]]),
            characters=_locate(encoded[index], example.context, question_first, padded, options.align_to_words),
            merges=True,
        )


def _check_room(tokenizer: Any, example: Example, options: PieceOptions, longest: int, shared: int) -> None:
    """Refuses lengths that leave no room for the context: the tokenizer would not raise, but abort the thread."""
    question = len(tokenizer(example.question, add_special_tokens=False)["input_ids"])
    if options.max_question_len is not None and question > options.max_question_len:
        reason = f"the question has {question} tokens, and questions are never cut; send a shorter one"
        raise check.refuse("max_question_len", reason)
    room = longest - question - tokenizer.num_special_tokens_to_add(pair=True)
    if shared < room:
        return
    context = len(tokenizer(example.context, add_special_tokens=False)["input_ids"])
    if context <= room:
        return
    if room <= 0:
        question_field = f"{example.field}.question"
        raise check.refuse(question_field, f"has {question} tokens, which leaves no room in a max_seq_len of {longest}")
    field = f"{example.field}.question" if options.doc_stride is None else "doc_stride"
    reason = f"pieces hold {room} tokens of the context, and must hold more than the {shared} that they share"
    raise check.refuse(field, reason)


def _locate(
    encoding: Any, context: str, question_first: bool, padded: int, align_to_words: bool
) -> Callable[[int, int], tuple[int, int, str]]:
    """Returns the function that finds the characters between two tokens of a piece (4.57.6: `get_indices`)."""
    sequence = 1 if question_first else 0

    def words(first: int, last: int) -> tuple[int, int] | None:
        """The characters of the words that the tokens belong to; None where the tokenizer has no words."""
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


# By words -------------------------------------------------------------------------------------------------------------


def _by_words(
    tokenizer: Any,
    names: Sequence[str],
    segments: bool,
    example: Example,
    options: PieceOptions,
    longest: int,
    step: int,
) -> Iterator[ContextPiece]:
    """Cuts for tokenizers that keep no characters (4.57.6: `squad_convert_example_to_features`)."""
    import numpy as np
    import torch

    words, word_of = _words(example.context)
    tokens: list[str] = []
    origin: list[int] = []  # for each token of the context, its word
    for index, word in enumerate(words):
        made = tokenizer.tokenize(word)
        tokens += made
        origin += [index] * len(made)
    if not tokens:
        raise check.refuse(f"{example.field}.context", "holds no token that the model knows")
    limit = 64 if options.max_question_len is None else options.max_question_len
    question = tokenizer.encode(example.question, add_special_tokens=False, truncation=True, max_length=limit)
    room = longest - len(question) - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= 0:
        reason = f"has {len(question)} tokens, which leaves no room in a max_seq_len of {longest}"
        raise check.refuse(f"{example.field}.question", reason)
    if step == 0 and len(tokens) > room:
        raise check.refuse("doc_stride", "must be at least 1: with this tokenizer, it is how far apart pieces begin")
    question_first = tokenizer.padding_side == "right"
    before = len(question) + tokenizer.num_special_tokens_to_add(pair=False)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    for begin in range(0, len(ids), max(step, 1)):
        window = ids[begin : begin + room]
        read = tokenizer.prepare_for_model(
            question if question_first else window,
            pair_ids=window if question_first else question,
            padding="max_length",
            max_length=longest,
            return_attention_mask=True,
        )
        row = np.array(read["input_ids"])
        closed = np.ones_like(row)
        unpadded = int(np.sum(read["attention_mask"]))
        # Computed here, because some tokenizers of transformers 5 forget the second text.
        read["token_type_ids"] = np.zeros_like(row).tolist()
        if segments:
            start = 0 if question_first else len(row) - unpadded
            ahead = before if question_first else len(window) + before - len(question)
            read["token_type_ids"][start + ahead : start + unpadded] = [1] * (unpadded - ahead)
        closed[slice(before, None) if question_first else slice(len(row) - unpadded, len(row) - before)] = 0
        special = tokenizer.get_special_tokens_mask(read["input_ids"], already_has_special_tokens=True)
        closed[np.array(special) == 1] = 1
        if tokenizer.cls_token_id in read["input_ids"]:  # models that know "no answer" express it by this token
            closed[read["input_ids"].index(tokenizer.cls_token_id)] = 0
        attention = np.array([read["attention_mask"]])
        first = before if question_first else 0
        place = {first + index: origin[begin + index] for index in range(len(window))}
        yield ContextPiece(
            tensors={name: torch.tensor([read[name]]) for name in names},
            closed=closed[None],
            attention=attention,
            characters=_word_locator(words, word_of, place),
            merges=False,
        )
        if begin + room >= len(ids):
            return


def _words(text: str) -> tuple[list[str], list[int]]:
    """The words of `text`, and for each character the index of its word; a space has that of the word before it."""
    words: list[str] = []
    word_of = []
    in_word = False
    for character in text:
        space = character in _SPACES
        if not space and in_word:
            words[-1] += character
        elif not space:
            words.append(character)
        in_word = not space
        word_of.append(len(words) - 1)
    return words, word_of


def _word_locator(
    words: list[str], word_of: list[int], place: Mapping[int, int]
) -> Callable[[int, int], tuple[int, int, str] | None]:
    def characters(first: int, last: int) -> tuple[int, int, str] | None:
        if first not in place or last not in place:
            return None
        begin, end = place[first], place[last]
        final = len(word_of) - 1 - word_of[::-1].index(end)  # upstream's end: the last character, spaces included
        return word_of.index(begin), final, " ".join(words[begin : end + 1])

    return characters
