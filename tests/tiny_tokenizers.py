"""The tokenizers of the tiny test models: small ones of every kind, made from one short text.

Each function writes a tokenizer's files into a folder. They are trained by counting only, so that every machine makes
the same: the golden results depend on it. Any thread may call them. Must not know models or weights.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROWS = 512  # tokens of a byte-level vocabulary

TEXT = """
The little harbour town wakes before the sun. Fishermen carry their nets down to the water while the bakers light the
ovens. In 1999 the old lighthouse was painted white and red, and since then visitors have come from Paris, London and
Berlin to see it. Anna Schmidt keeps the keys. She was born in Hamburg, but she has lived near the sea for forty years.
Every morning she climbs the one hundred and twenty stairs, cleans the glass, and writes the weather in a blue book.
A small museum tells the story of the ships that were lost on the rocks, and of the people who saved the sailors.
Models of language read many books and learn which word may follow another word. What is the capital of France? The
capital of France is Paris. Who wrote the letter? The letter was written by John Smith, a teacher at the university.
How many stairs are there? How do you do? My name is Sarah and I live in London. Summarize the following text: the
committee agreed on Monday that the bridge must be closed for repairs during the summer, because the iron has become
weak. Translate English to German: the house is wonderful. Das Haus ist wunderbar. La maison est magnifique. The quick
brown fox jumps over the lazy dog. I love this movie, it is great and beautiful! This film is terrible, boring and far
too long. Would you like some tea or coffee? Yes, please; two cups with milk and no sugar. The company Apple sold three
million phones last year, said its president in New York. Water boils at one hundred degrees. The moon moves around
the earth, and the earth moves around the sun. Good night, and thank you for everything.
"""

# A chat template of the kind that ChatML models have; it writes the beginning-of-text token itself.
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _lines() -> list[str]:
    return [line for line in TEXT.strip().splitlines() if line]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def byte_level(folder: Path, specials: list[str], post_processor: Callable[[Any], Any]) -> Any:
    """Train a byte-level BPE tokenizer (GPT-2's kind) and write it as `tokenizer.json`, `vocab.json`, `merges.txt`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, lstrip=text == "<mask>") for text in specials])
    tokenizer.post_processor = post_processor(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return tokenizer


def wordpiece(folder: Path, extra: list[str]) -> list[str]:
    """Write a lower-casing WordPiece tokenizer (BERT's kind), `tokenizer.json` and `vocab.txt`; return its vocabulary.

    The pieces are the letters, and the text's words and word endings, most frequent first: the trainer of
    `tokenizers` breaks ties by chance.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = Counter(re.findall(r"[a-z]+", TEXT.lower()))
    whole = [word for word, count in words.items() if count > 1 or len(word) < 5]
    ends = Counter("##" + word[-size:] for word in words for size in (2, 3) if len(word) > size + 1)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces = [
        *letters,
        *("##" + letter for letter in letters),
        *whole,
        *(end for end, count in ends.items() if count > 2),
    ]
    vocabulary = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *extra, *pieces]))
    tokenizer = Tokenizer(models.WordPiece({piece: rank for rank, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(vocabulary[: 5 + len(extra)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(text, vocabulary.index(text)) for text in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary), encoding="utf-8")
    return vocabulary


def metaspace_pieces(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces of SentencePiece's form, most basic first, and the merges that make them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["▁", "é", "ü", "ß"]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]


def unigram(folder: Path, before: list[str], after: list[str], template: Mapping[str, Any]) -> list[str]:
    """Write a Unigram `tokenizer.json` (T5, mBART) and return its vocabulary: `before`, the pieces, `after`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces, _ = metaspace_pieces(280)
    scored = [(piece, -5.0 - rank / 128) for rank, piece in enumerate(pieces)]
    vocabulary = [(token, 0.0) for token in before] + scored + [(token, 0.0) for token in after]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=before.index("<unk>"), byte_fallback=False))
    if template.get("collapse_spaces"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*before, *after])
    marks = [(token, tokenizer.token_to_id(token)) for token in template["tokens"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template["single"], pair=template["pair"], special_tokens=marks
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return [token for token, _ in vocabulary]


def sentencepiece_model(path: Path, size: int) -> list[str]:
    """Train a SentencePiece model by counting pairs, write it to `path`, and return its pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]


def byte_fallback(folder: Path, template: str | None = None) -> int:
    """Write a BPE tokenizer of SentencePiece's form (Llama 2, Mistral, Phi-3) with a token for every byte; return how
    many tokens it has. Each text begins with `<s>` and a space of the tokenizer's own, which decoding takes away."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces, merges = metaspace_pieces(280)
    marks = ["<unk>", "<s>", "</s>"]
    vocabulary = list(dict.fromkeys([*marks, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]))
    ids = {piece: rank for rank, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(marks)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}
    write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    return len(vocabulary)
