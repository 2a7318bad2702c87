"""Make the golden results of the tasks that transformers 5 removed, with transformers 4.57.6 itself.

Run by a person, in an environment of its own, on the tiny models that `tests/tiny_models.py` built:

    pip install transformers==4.57.6 torch==2.13.0 sentencepiece==0.2.3 protobuf==7.36.2
    python tests/tiny_models.py MODELS_ROOT                       (in the project's own environment)
    python tests/golden/make_golden.py MODELS_ROOT tests/golden/tasks.json

Without `sacremoses`, as the project's environment is. One thing is changed on purpose: where the call asks for a
`max_length`, the pipeline's own 256 new tokens are taken back.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

Case = tuple[str, str, Any, dict[str, Any]]

FOX = "The quick brown fox jumps over the lazy dog."
TOWN = (
    "The little harbour town wakes before the sun. Fishermen carry their nets down to the water while the bakers light "
    "the ovens. Anna Schmidt keeps the keys of the old lighthouse, which was painted white and red in 1999."
)
UNICODE = "Zoë's naïve café — 東京 is “big” ½ ﬁne 😀, isn't it ?"
SPACES = "  two  spaces ,\tone tab .\n  Don't you 've it ?  "
LONG = " ".join([TOWN] * 12)

SHORT = {"max_new_tokens": 12}


def _text_cases() -> list[Case]:
    cases: list[Case] = []
    tasks = {
        "bart": ["summarization", "text2text-generation"],
        "t5": ["summarization", "translation_en_to_fr", "translation_en_to_de", "translation", "text2text-generation"],
        "marian": ["translation", "translation_en_to_de", "text2text-generation"],
    }
    for model, names in tasks.items():
        for task in names:
            cases += [(model, task, text, SHORT) for text in (FOX, TOWN, UNICODE, SPACES, "", "a")]
            cases += [(model, task, [FOX, TOWN, UNICODE], SHORT), (model, task, [FOX], SHORT)]
            cases += [(model, task, FOX, {})]  # the defaults: 256 new tokens, 4 beams, the model's own settings
            cases += [(model, task, TOWN, {"max_length": 9}), (model, task, [FOX, TOWN], {"max_length": 20})]
    ways: list[dict[str, Any]] = [
        {"min_length": 15, "max_length": 25},
        {"min_new_tokens": 8, "max_new_tokens": 10},
        {"num_beams": 1},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 5, "num_return_sequences": 3, "early_stopping": True},
        {"early_stopping": "never", "length_penalty": 2.0},
        {"length_penalty": -1.0, "num_beams": 6},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.3, "num_beams": 1},
        {"bad_words_ids": [[30], [40, 41]]},
        {"suppress_tokens": list(range(20, 60))},
        {"begin_suppress_tokens": list(range(100, 200))},
        {"sequence_bias": [[[50], 3.0]]},
        {"forced_eos_token_id": 60},
        {"decoder_start_token_id": 70},
        {"renormalize_logits": True},
        {"use_cache": False},
        {"truncation": True},
        {"truncation": "only_first"},
        {"truncation": "do_not_truncate"},
        {"clean_up_tokenization_spaces": True},
        {"clean_up_tokenization_spaces": False},
        {"stop_sequence": "and"},
        {"stop_sequence": " many words"},
        {"return_text": True},
        {"eos_token_id": [1, 2, 90]},
    ]
    turns = itertools.cycle([("bart", "summarization"), ("t5", "translation_en_to_fr"), ("marian", "translation")])
    for way in ways:
        for text in (FOX, TOWN):
            model, task = next(turns)
            cases.append((model, task, text, way if "max_length" in way else {**SHORT, **way}))
    cases += [(model, task, LONG, {**SHORT, "truncation": True}) for model, task in itertools.islice(turns, 3)]
    cases.append(("t5", "summarization", LONG, SHORT))  # relative positions: no end
    cases.append(("marian", "translation", [FOX, TOWN], {**SHORT, "num_return_sequences": 2}))
    return cases


def _language_cases() -> list[Case]:
    pairs = {
        "mbart": [("en_XX", "ro_RO"), ("de_DE", "en_XX")],
        "mbart50": [("en_XX", "fr_XX"), ("uk_UA", "en_XX")],
        "m2m100": [("en", "fr"), ("de", "zh")],
        "nllb": [("eng_Latn", "fra_Latn"), ("zho_Hans", "eng_Latn")],
    }
    cases: list[Case] = []
    for model, languages in pairs.items():
        for source, target in languages:
            codes = {"src_lang": source, "tgt_lang": target}
            cases += [(model, "translation", text, {**codes, **SHORT}) for text in (FOX, TOWN, UNICODE, SPACES)]
            cases += [(model, "translation", [FOX, TOWN], {**codes, "max_length": 11, "num_beams": 2})]
        cases += [
            (model, "translation", TOWN, {**codes, "max_new_tokens": 30, "num_return_sequences": 2}),
            (model, "translation", LONG, {**codes, **SHORT, "truncation": True}),
            (model, "summarization", FOX, SHORT),
            (model, "text2text-generation", TOWN, SHORT),
        ]
    cases.append(("m2m100", "translation_en_to_fr", FOX, SHORT))
    return cases


def _question_cases() -> list[Case]:
    who = {"question": "Who keeps the keys?", "context": TOWN}
    what = {"question": "What is the capital of France?", "context": "The capital of France is Paris. " + FOX}
    odd = {"question": "Zoë's 東京 ?", "context": UNICODE + " " + SPACES}
    far = {"question": "When was the lighthouse painted?", "context": LONG}
    ways: list[dict[str, Any]] = [
        {},
        {"top_k": 3},
        {"top_k": 20},
        {"top_k": 1000},
        {"max_answer_len": 1},
        {"max_answer_len": 60, "top_k": 2},
        {"handle_impossible_answer": True},
        {"handle_impossible_answer": True, "top_k": 5},
        {"align_to_words": False},
        {"align_to_words": False, "top_k": 7},
        {"max_seq_len": 64},
        {"max_seq_len": 64, "doc_stride": 16},
        {"max_seq_len": 100, "doc_stride": 1, "top_k": 4, "handle_impossible_answer": True},
        {"padding": "max_length"},
        {"padding": True, "max_seq_len": 80, "doc_stride": 20},
        {"max_question_len": 64},
    ]
    cases: list[Case] = []
    for model in ("bert-qa", "roberta-qa", "canine-qa"):
        cases += [(model, "question-answering", item, way) for item in (who, odd, far) for way in ways]
        cases += [
            (model, "question-answering", what, {}),
            (model, "question-answering", [who, what, far], {}),
            (model, "question-answering", [who, what], {"top_k": 2}),
            (model, "question-answering", [who], {}),
            (model, "question-answering", {"question": ["Who?", "When?"], "context": TOWN}, {}),
            (model, "question-answering", {"question": ["Who?", "Where?"], "context": [TOWN, FOX]}, {"top_k": 2}),
            (model, "question-answering", {"question": "?", "context": "x"}, {"top_k": 3}),
        ]
    return [case for case in cases if _worth_its_time(case, far)]


def _worth_its_time(case: Case, far: Any) -> bool:
    """Whether the case tells something that others do not; and one that 4.57.6 can answer.

    CANINE's tokenizer, written in Python, cannot say where every candidate is: with many of them, 4.57.6 fails. Its
    tokens are characters, so a long context is many pieces.
    """
    model, _, inputs, parameters = case
    if model == "canine-qa":
        few = parameters.get("top_k", 1) <= 5
        return few and (inputs != far or (parameters.get("max_seq_len") is None and parameters.get("top_k", 1) > 1))
    return inputs != far or parameters.get("top_k") != 1000


def _ask(pipeline: Any, task: str, inputs: Any, parameters: dict[str, Any]) -> Any:
    if task == "question-answering":
        return pipeline(**inputs, **parameters) if isinstance(inputs, dict) else pipeline(inputs, **parameters)
    if "max_new_tokens" not in parameters and parameters.get("max_length"):
        parameters = {**parameters, "max_new_tokens": None}
    return pipeline(inputs, **parameters)


def main(root: Path, out: Path) -> None:
    """Ask every case of a pipeline made for it alone (a pipeline changes its model's config) and write the answers."""
    import torch
    import transformers

    if transformers.__version__ != "4.57.6":
        raise SystemExit(f"This needs transformers 4.57.6, not {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = []
    for model, task, inputs, parameters in _text_cases() + _language_cases() + _question_cases():
        pipeline = transformers.pipeline(task, model=str(root / "tiny" / model), device="cpu")
        result = _ask(pipeline, task, inputs, parameters)
        cases.append({"model": model, "task": task, "inputs": inputs, "parameters": parameters, "result": result})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    versions = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]})
    out.write_text(f'{{"made_with": {versions},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(cases)} cases in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
