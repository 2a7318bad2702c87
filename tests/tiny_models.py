"""Tiny real models for the tests: each a complete folder (config, safetensors, tokenizer) as a Hub repository has it.

`build(root, name)` makes `<root>/tiny/<name>` once, atomically, and returns the model id; any thread or process may
call it. Weights come from integers and the parameter's name only, and tokenizers are trained by counting only, so that
every machine and every version of the libraries makes the same model: the golden results depend on it.
By hand: `python tests/tiny_models.py ROOT [NAME ...]`.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tiny_tokenizers import (
    CHATML,
    ROWS,
    byte_level,
    metaspace_pieces,
    sentencepiece_model,
    unigram,
    wordpiece,
    write_json,
)

ORG = "tiny"

# How wide the uniform values of a matrix are: the first pattern found in the parameter's name decides. Sharp attention
# and weak feed-forward layers (whose mean is a constant) make greedy text depend on the prompt and on what came before.
_WIDTHS = (
    (r"(embed_tokens|shared|word_embeddings|wte|lm_head)\.weight$", 0.5),
    (r"(encoder_attn\.out_proj|EncDecAttention\.o)\.weight$", 1.2),
    (r"(embed_positions|wpe|position_embeddings)\.weight$", 1.0),
    (r"(q_proj|k_proj|query|key|\.q|\.k|q_lin|k_lin)\.weight$", 1.2),
    (r"(fc2|wo|mlp\.c_proj|output\.dense|lin2)\.weight$", 0.3),
    (r"", 0.6),
)


def _fill(model: Any) -> None:
    """Give each parameter the values that its name says: uniform, so that no machine's arithmetic is involved.

    Computed tables (no gradient) stay. An end-of-sequence bias, where there is one, lets some beams end early.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.rand(parameter.shape, generator=generator) * 2 - 1
            if parameter.dim() == 1:
                values = values / 4 + float(name.endswith("weight"))  # a norm's gain is about 1, a bias about 0
            else:
                values = values * next(width for pattern, width in _WIDTHS if re.search(pattern, name))
            parameter.copy_(values)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias[0, model.config.eos_token_id] = 1.5


def _save(folder: Path, auto: str, config: dict[str, Any]) -> None:
    """Write `config` as `config.json` and the weights of such a model beside it."""
    import torch
    import transformers

    write_json(folder / "config.json", config)
    loaded = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, auto).from_config(loaded, dtype=torch.float32).eval()
    _fill(model)
    model.tie_weights()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch)
        shutil.move(Path(scratch) / "model.safetensors", folder / "model.safetensors")


def _config(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    """A `config.json` as transformers 4 wrote them, which both versions read."""
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "float32", **values}


def _generation(folder: Path, **values: Any) -> None:
    write_json(folder / "generation_config.json", {"_from_model_config": True, **values})


def _tokenizer_config(folder: Path, tokenizer_class: str, **values: Any) -> None:
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, **values})


# Builders -------------------------------------------------------------------------------------------------------------


def _gpt2(folder: Path) -> None:
    from tokenizers import processors

    end = "<|endoftext|>"
    tokenizer = byte_level(folder, [end], lambda _: processors.ByteLevel(trim_offsets=False))
    marks = {"bos_token": end, "eos_token": end, "unk_token": end}
    _tokenizer_config(folder, "GPT2Tokenizer", model_max_length=256, add_prefix_space=False, **marks)
    ids = {"bos_token_id": tokenizer.token_to_id(end), "eos_token_id": tokenizer.token_to_id(end)}
    shape = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "vocab_size": ROWS}
    _generation(folder, **ids)
    _save(folder, "AutoModelForCausalLM", _config("GPT2LMHeadModel", "gpt2", **shape, **ids))


def _llama(folder: Path) -> None:
    from tokenizers import processors

    def begin(tokenizer: Any) -> Any:
        bos = specials[0]
        mark = [(bos, tokenizer.token_to_id(bos))]
        return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=mark)

    specials = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(folder, specials, begin)
    marks = {"bos_token": specials[0], "eos_token": specials[2], "pad_token": specials[2]}
    _tokenizer_config(folder, "PreTrainedTokenizerFast", model_max_length=512, chat_template=CHATML, **marks)
    ids = {f"{role}_token_id": tokenizer.token_to_id(marks[f"{role}_token"]) for role in ("bos", "eos")}
    _generation(folder, **ids)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    rest = {"vocab_size": ROWS, "tie_word_embeddings": False, "hidden_act": "silu"}
    _save(folder, "AutoModelForCausalLM", _config("LlamaForCausalLM", "llama", **shape, **heads, **rest, **ids))


_BART_SHAPE = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": ROWS,
    "max_position_embeddings": 512,
}


def _roberta_tokens(folder: Path, tokenizer_class: str) -> None:
    from tokenizers import processors

    def surround(tokenizer: Any) -> Any:
        ends = [(text, tokenizer.token_to_id(text)) for text in ("</s>", "<s>")]
        return processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    byte_level(folder, specials, surround)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    more = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    _tokenizer_config(folder, tokenizer_class, model_max_length=512, add_prefix_space=False, **marks, **more)


def _bart(folder: Path) -> None:
    _roberta_tokens(folder, "BartTokenizer")
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    forced = {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3}
    asked = {"num_beams": 2, "max_length": 40, "min_length": 6, "length_penalty": 2.0, "early_stopping": True}
    _generation(folder, **ids, **forced)
    config = _config("BartForConditionalGeneration", "bart", **_BART_SHAPE, **ids, is_encoder_decoder=True)
    _save(folder, "AutoModelForSeq2SeqLM", {**config, "task_specific_params": {"summarization": asked}})


def _t5(folder: Path) -> None:
    extra = [f"<extra_id_{index}>" for index in reversed(range(10))]
    template = {"single": "$A </s>", "pair": "$A </s> $B </s>", "tokens": ["</s>"]}
    tokens = unigram(folder, ["<pad>", "</s>", "<unk>"], extra, template)
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 10}
    _tokenizer_config(folder, "T5Tokenizer", model_max_length=512, additional_special_tokens=extra, **marks)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    rest = {
        "vocab_size": len(tokens),
        "n_positions": 512,
        "is_encoder_decoder": True,
        "relative_attention_num_buckets": 8,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    beams = {"early_stopping": True, "num_beams": 4}
    summary = {"max_length": 60, "min_length": 10, "no_repeat_ngram_size": 3, "length_penalty": 2.0}
    tasks: dict[str, Any] = {"summarization": {**beams, **summary, "prefix": "summarize: "}}
    for code, language in (("de", "German"), ("fr", "French")):
        asked = {"max_length": 50, "prefix": f"translate English to {language}: "}
        tasks[f"translation_en_to_{code}"] = {**beams, **asked}
    _generation(folder, **ids)
    config = _config("T5ForConditionalGeneration", "t5", **shape, **rest, **ids, task_specific_params=tasks)
    _save(folder, "AutoModelForSeq2SeqLM", config)


def _marian(folder: Path) -> None:
    pieces = sentencepiece_model(folder / "source.spm", 300)
    shutil.copy(folder / "source.spm", folder / "target.spm")
    tokens = ["</s>", "<unk>", *(piece for piece in pieces if piece not in ("</s>", "<unk>", "<s>")), "<pad>"]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    languages = {"source_lang": "en", "target_lang": "de"}
    _tokenizer_config(folder, "MarianTokenizer", model_max_length=512, **languages, **marks)
    pad = len(tokens) - 1
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": pad, "decoder_start_token_id": pad}
    asked = {"max_length": 64, "num_beams": 3, "bad_words_ids": [[pad]], "forced_eos_token_id": 0}
    _generation(folder, **ids, **asked)
    shape = {**_BART_SHAPE, "vocab_size": len(tokens), "decoder_vocab_size": len(tokens)}
    rest = {"scale_embedding": True, "static_position_embeddings": True, "is_encoder_decoder": True}
    rest |= {"share_encoder_decoder_embeddings": True, "activation_function": "swish"}
    _save(folder, "AutoModelForSeq2SeqLM", _config("MarianMTModel", "marian", **shape, **rest, **ids))


def _language_coded(folder: Path, kind: str) -> None:
    """mBART, mBART-50: a Unigram vocabulary with the language codes at its end."""
    import transformers.models.mbart.tokenization_mbart as mbart
    import transformers.models.mbart50.tokenization_mbart50 as mbart50

    codes = (mbart50 if kind == "MBart50" else mbart).FAIRSEQ_LANGUAGE_CODES
    before = ["<s>", "<pad>", "</s>", "<unk>"]
    around: dict[str, Any] = {"single": "$A </s> en_XX", "pair": "$A $B </s> en_XX"}
    if kind == "MBart50":
        around = {"single": "en_XX $A </s>", "pair": "en_XX $A $B </s>", "collapse_spaces": True}
    around["tokens"] = ["</s>", "en_XX"]
    tokens = unigram(folder, before, [*codes, "<mask>"], around)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "src_lang": "en_XX"}
    more = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>", "additional_special_tokens": codes}
    _tokenizer_config(folder, f"{kind}Tokenizer", model_max_length=256, **marks, **more)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    ids["decoder_start_token_id"] = 2 if kind == "MBart50" else tokens.index("ro_RO")
    _generation(folder, **ids, max_length=100, num_beams=5, early_stopping=True, forced_eos_token_id=2)
    shape = {**_BART_SHAPE, "vocab_size": len(tokens), "scale_embedding": True, "is_encoder_decoder": True}
    _save(folder, "AutoModelForSeq2SeqLM", _config("MBartForConditionalGeneration", "mbart", **shape, **ids))


def _m2m100(folder: Path) -> None:
    pieces = sentencepiece_model(folder / "sentencepiece.bpe.model", 300)
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [*marks, *(piece for piece in pieces if piece not in marks)]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    names = {f"{role}_token": mark for role, mark in zip(("bos", "pad", "eos", "unk"), marks, strict=True)}
    _tokenizer_config(folder, "M2M100Tokenizer", model_max_length=256, sep_token="</s>", **names)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    _generation(folder, **ids, max_length=80, num_beams=5, early_stopping=True)
    rows = len(tokens) + 100 + 8  # a hundred languages and eight rows that mean nothing, as the tokenizer counts them
    shape = {**_BART_SHAPE, "vocab_size": rows, "scale_embedding": True, "is_encoder_decoder": True}
    _save(folder, "AutoModelForSeq2SeqLM", _config("M2M100ForConditionalGeneration", "m2m_100", **shape, **ids))


def _nllb(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    codes = ["eng_Latn", "deu_Latn", "fra_Latn", "zho_Hans", "spa_Latn"]
    before, (pieces, merges) = ["<s>", "<pad>", "</s>", "<unk>"], metaspace_pieces(280)
    vocabulary = {token: index for index, token in enumerate([*before, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*before, *codes, "<mask>"])
    marks = [(token, tokenizer.token_to_id(token)) for token in ("eng_Latn", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="eng_Latn $A </s>", pair="eng_Latn $A $B </s>", special_tokens=marks
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "src_lang": "eng_Latn"}
    more = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>", "additional_special_tokens": codes}
    _tokenizer_config(folder, "NllbTokenizer", model_max_length=256, **names, **more)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    _generation(folder, **ids, max_length=200)
    shape = {**_BART_SHAPE, "vocab_size": tokenizer.get_vocab_size(), "scale_embedding": True}
    config = _config("M2M100ForConditionalGeneration", "m2m_100", **shape, **ids, is_encoder_decoder=True)
    _save(folder, "AutoModelForSeq2SeqLM", config)


_BERT_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def _bert(architecture: str, auto: str, labels: tuple[str, ...] = ()) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = len(wordpiece(folder, []))
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        kind = "DistilBertTokenizer" if architecture.startswith("DistilBert") else "BertTokenizer"
        _tokenizer_config(folder, kind, model_max_length=512, do_lower_case=True, mask_token="[MASK]", **names)
        config = _config(architecture, "bert", **_BERT_SHAPE, vocab_size=rows)
        if kind.startswith("Distil"):
            shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": rows, "pad_token_id": 0}
            config = _config(architecture, "distilbert", **shape, max_position_embeddings=512)
        if labels:
            config["id2label"] = {str(index): label for index, label in enumerate(labels)}
            config["label2id"] = {label: index for index, label in enumerate(labels)}
        _save(folder, auto, config)

    return make


def _roberta(architecture: str, auto: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _roberta_tokens(folder, "RobertaTokenizer")
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        shape = {**_BERT_SHAPE, **ids, "max_position_embeddings": 514, "type_vocab_size": 1}
        _save(folder, auto, _config(architecture, "roberta", **shape, vocab_size=ROWS))

    return make


def _canine(folder: Path) -> None:
    """CANINE reads characters, with a tokenizer that is written in Python and has no files."""
    _tokenizer_config(folder, "CanineTokenizer", model_max_length=2048)
    shape = {
        key: value for key, value in _BERT_SHAPE.items() if key not in ("max_position_embeddings", "type_vocab_size")
    }
    more = {"max_position_embeddings": 2048, "type_vocab_size": 16, "bos_token_id": 57344, "eos_token_id": 57345}
    hashes = {"num_hash_functions": 4, "num_hash_buckets": 2048, "local_transformer_stride": 16}
    config = _config("CanineForQuestionAnswering", "canine", **shape, **more, **hashes, downsampling_rate=4)
    _save(folder, "AutoModelForQuestionAnswering", config)


def _tapas(folder: Path) -> None:
    rows = len(wordpiece(folder, ["[EMPTY]"]))
    (folder / "tokenizer.json").unlink()  # TAPAS reads tables in Python, from vocab.txt
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    more = {"mask_token": "[MASK]", "empty_token": "[EMPTY]", "do_lower_case": True, "model_max_length": 512}
    _tokenizer_config(folder, "TapasTokenizer", **names, **more)
    types = {"type_vocab_sizes": [3, 256, 256, 2, 256, 256, 10]}
    labels = {"num_aggregation_labels": 4, "use_answer_as_supervision": True, "answer_loss_cutoff": 0.66}
    labels |= {"aggregation_labels": {"0": "NONE", "1": "SUM", "2": "AVERAGE", "3": "COUNT"}}
    shape = {key: value for key, value in _BERT_SHAPE.items() if key != "type_vocab_size"}
    config = _config("TapasForQuestionAnswering", "tapas", **shape, **types, **labels, vocab_size=rows)
    _save(folder, "AutoModelForTableQuestionAnswering", config)


MODELS: Mapping[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
    "dialogpt": _gpt2,
    "llama": _llama,
    "bart": _bart,
    "t5": _t5,
    "marian": _marian,
    "mbart": partial(_language_coded, kind="MBart"),
    "mbart50": partial(_language_coded, kind="MBart50"),
    "m2m100": _m2m100,
    "nllb": _nllb,
    "bert-mlm": _bert("BertForMaskedLM", "AutoModelForMaskedLM"),
    "roberta-mlm": _roberta("RobertaForMaskedLM", "AutoModelForMaskedLM"),
    "distilbert-sst2": _bert(
        "DistilBertForSequenceClassification", "AutoModelForSequenceClassification", ("NEGATIVE", "POSITIVE")
    ),
    "bert-ner": _bert(
        "BertForTokenClassification",
        "AutoModelForTokenClassification",
        ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"),
    ),
    "bert-nli": _bert(
        "BertForSequenceClassification",
        "AutoModelForSequenceClassification",
        ("contradiction", "neutral", "entailment"),
    ),
    "bert-qa": _bert("BertForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "roberta-qa": _roberta("RobertaForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "canine-qa": _canine,
    "bert-embed": _bert("BertModel", "AutoModel"),
    "tapas": _tapas,
}


def build(root: Path, name: str) -> str:
    """Make model `name` of `MODELS` under `root`, if it is not there yet, and return its id `tiny/<name>`.

    The folder appears complete or not at all; of two builders at once, the first to finish wins.
    """
    target = root / ORG / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            MODELS[name](folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():
                    raise
    return f"{ORG}/{name}"


def main(arguments: list[str]) -> None:
    """Build the named models (all of them, if none is named) under the folder given first."""
    for name in arguments[1:] or MODELS:
        print(build(Path(arguments[0]), name))


if __name__ == "__main__":
    main(sys.argv[1:])
