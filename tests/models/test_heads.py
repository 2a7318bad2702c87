"""A folder of files becomes the right head with all of its weights, whatever family and age the checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from changed_models import copy, edit, load, text
from loaded_parts import noted_models

from huggingface.errors import FilesCorrupt, ModelUnsupported
from huggingface.inspection.preflight import Preflight
from huggingface.tasks import TASKS, canonical_task
from huggingface.types import LoadOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder of these tests' own."""
    return tmp_path_factory.mktemp("heads")


@pytest.mark.parametrize(
    ("name", "architectures", "model_type", "head"),
    [
        ("bert-mlm", ["BertForPreTraining"], "fill-mask", "masked-lm"),
        ("t5", ["T5WithLMHeadModel"], "translation", "seq2seq-lm"),
        ("bart", ["BartForConditionalGeneration"], "summarization", "seq2seq-lm"),
        ("bart", ["BartForConditionalGeneration"], "fill-mask", "seq2seq-lm"),
        ("bart", ["BartForConditionalGeneration"], "conversational", "seq2seq-lm"),
        ("gpt2", None, "text-generation", "causal-lm"),
        ("t5", None, "text-generation", "seq2seq-lm"),
        ("distilbert-sst2", None, "sentiment-analysis", "sequence-classification"),
        ("bert-mlm", ["BertForMaskedLM"], "text-generation", "masked-lm"),
        ("bert-mlm", ["BertForMaskedLM"], "feature-extraction", "base"),
        ("roberta-qa", ["RobertaForQuestionAnswering"], "sentiment-analysis", "question-answering"),
    ],
)
def test_the_head_is_the_one_that_the_weights_have(
    root: Path, name: str, architectures: list[str] | None, model_type: str, head: str
) -> None:
    model_id = f"heads/{name}-{model_type}-{'named' if architectures else 'unnamed'}"
    edit(copy(root, name, model_id), architectures=architectures)
    model = load(root, model_id, model_type)
    assert model.head == head
    if model_type == "fill-mask":
        assert model.run("fill-mask", "Good <mask>." if name == "bart" else "good [MASK].", {})
    model.close()


def test_weights_that_do_not_say_what_they_are_and_do_not_fit_the_type_are_refused(root: Path) -> None:
    edit(copy(root, "bert-mlm", "heads/unknown"), architectures=None)
    with pytest.raises(ModelUnsupported, match="architectures"):
        load(root, "heads/unknown", "translation")
    with pytest.raises(FilesCorrupt, match="do not fill the model"):
        load(root, "heads/unknown", "sentiment-analysis")


_LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_BERT = {**_LLAMA, "max_position_embeddings": 514}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "pad_token_id": 1}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "MistralForCausalLM": {**_LLAMA, "num_key_value_heads": 2},
    "Gemma2ForCausalLM": {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "Gemma3ForCausalLM": {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "Phi3ForCausalLM": {**_LLAMA, "pad_token_id": 0},
    "GPTNeoXForCausalLM": _BERT,
    "OPTForCausalLM": {**_LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "T5ForConditionalGeneration": _T5,
    "MT5ForConditionalGeneration": {**_T5, "tie_word_embeddings": False},
    "PegasusForConditionalGeneration": _BART,
    "MarianMTModel": {**_BART, "eos_token_id": 0},
    "BlenderbotForConditionalGeneration": _BART,
    "M2M100ForConditionalGeneration": _BART,
    "BertForPreTraining": _BERT,
    "AlbertForMaskedLM": {**_BERT, "embedding_size": 16},
    "ElectraForMaskedLM": {**_BERT, "embedding_size": 16},
    "DebertaV2ForMaskedLM": {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "XLMRobertaForMaskedLM": {**_BERT, "pad_token_id": 1},
    "MPNetModel": {**_BERT, "pad_token_id": 1},
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_loads_whole_from_half_precision_without_metadata(root: Path, architecture: str) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    model_id = f"families/{architecture}"
    folder = copy(root, "gpt2", model_id)
    for path in folder.glob("*config.json"):
        path.unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    torch.manual_seed(0)
    kind = getattr(transformers, architecture)
    original = kind(kind.config_class(vocab_size=512, **FAMILIES[architecture])).eval()
    original.save_pretrained(folder)
    dtype = torch.bfloat16 if len(architecture) % 2 else torch.float16
    halves = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors")  # no {"format": "pt"}, as some old checkpoints
    plain = kind.from_pretrained(folder, dtype=torch.float32)
    types = {"Model": "feature-extraction", "MaskedLM": "fill-mask", "PreTraining": "fill-mask"}
    model_type = next((value for key, value in types.items() if architecture.endswith(key)), "text-generation")
    if architecture == "MarianMTModel":
        model_type = "translation"
    with noted_models() as read:
        model = load(root, model_id, model_type)
        model.prepared()
    [loaded] = read
    assert loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name.removeprefix("model.") if model.head == "base" else name]), (
            name
        )
    if model.head in ("causal-lm", "seq2seq-lm"):
        assert text(model) is not None
    else:
        assert model.run("feature-extraction", "The little harbour", {})
        model.close()


@pytest.mark.parametrize("generation_config", [True, False])
@pytest.mark.parametrize(
    ("name", "legacy"),
    [
        ("bart", {"num_beams": 3, "length_penalty": 2.0, "min_length": 12, "max_length": 60, "early_stopping": True}),
        ("t5", {"num_beams": 2, "task_specific_params": {"summarization": {"prefix": "summarize: ", "min_length": 5}}}),
        ("gpt2", {"task_specific_params": {"conversational": {"max_length": 1000}}, "top_k": 9, "max_length": 40}),
        ("marian", {"num_beams": 2, "max_length": 40, "bad_words_ids": [[10]]}),
    ],
)
def test_generation_values_in_an_old_config_act_as_transformers_lets_them(
    root: Path, name: str, legacy: dict[str, Any], generation_config: bool
) -> None:
    import transformers

    model_id = f"legacy/{name}-{generation_config}"
    folder = copy(root, name, model_id)
    edit(folder, **legacy, transformers_version="4.20.0")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation_config:
        ids = {
            key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key[-3:] == "_id"
        }
        edit(folder, "generation_config.json", no_repeat_ngram_size=2, **ids)
    kind = transformers.AutoModelForCausalLM if name == "gpt2" else transformers.AutoModelForSeq2SeqLM
    plain, tokenizer = kind.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    with noted_models() as read:
        model = load(root, model_id, "text-generation" if name == "gpt2" else "text2text-generation")
        model.prepared()
    [loaded] = read
    assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    for key, value in legacy.get("task_specific_params", {}).items():  # which the tasks read by themselves
        assert loaded.config.task_specific_params[key] == value
    ids = tokenizer("The little harbour", return_tensors="pt")["input_ids"]
    assert loaded.generate(ids, max_new_tokens=20).tolist() == plain.generate(ids, max_new_tokens=20).tolist()
    model.close()


# Of models that also see: what their text half is made of, and what the part that sees.
_HALF = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN = {"layer_types": ["linear_attention", "full_attention"]}
_QWEN_SEES = {"hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
_LLAMA_SEES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA_SEES |= {"image_size": 28, "vision_output_dim": 32, "projector_output_dim": 32, "projector_input_dim": 32}
HALVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3_5ForConditionalGeneration": ({**_HALF, **_QWEN}, _QWEN_SEES),
    "Qwen3_5MoeForConditionalGeneration": (
        {**_HALF, **_QWEN, **_EXPERTS, "shared_expert_intermediate_size": 32},
        _QWEN_SEES,
    ),
    "Llama4ForConditionalGeneration": (
        {**_HALF, "num_local_experts": 2, "intermediate_size_mlp": 64},
        _LLAMA_SEES,
    ),
}


def _tokens_of_gpt2(root: Path, model_id: str) -> Path:
    """A folder with a tokenizer, for a model that is still to come."""
    folder = copy(root, "gpt2", model_id)
    for path in folder.glob("*config.json"):
        path.unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    return folder


@pytest.mark.parametrize("architecture", HALVES)
def test_the_text_half_of_a_model_that_also_sees_writes_as_transformers_has_it(root: Path, architecture: str) -> None:
    """It is what AutoModelForCausalLM reads of the folder, and what is told of it before the load."""
    import torch
    import transformers

    model_id = f"halves/{architecture}"
    folder = _tokens_of_gpt2(root, model_id)
    kind = getattr(transformers, architecture)
    text_config, vision_config = HALVES[architecture]
    torch.manual_seed(0)
    kind(kind.config_class(text_config=text_config, vision_config=vision_config)).save_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("The little harbour", return_tensors="pt")
    expected = plain.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    told = Preflight(LoadOptions(root)).look_at(model_id, model_type="text-generation")
    assert (told["problem"], told["model_type"], told["known"]) == (None, "text-generation", True)
    model = load(root, model_id, "text-generation")
    assert model.head == "causal-lm"
    able = {canonical_task(task) for task in model.tasks.supported}
    assert told["tasks"] == [task for task in TASKS if task in able]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert text(model) == tokenizer.decode(expected, skip_special_tokens=True)


def test_fsmt_translates_as_transformers_does(root: Path) -> None:
    """Its decoder has no config of its own, and its table of positions grows."""
    import torch
    import transformers

    folder = _tokens_of_gpt2(root, "heads/fsmt")
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    shape |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 16}
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=512, tgt_vocab_size=512, max_length=200, num_beams=2, **shape
    )
    torch.manual_seed(0)
    transformers.FSMTForConditionalGeneration(config).save_pretrained(folder)
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = "The little harbour lies " * 10
    expected = plain.generate(**tokenizer(words, return_tensors="pt"), max_new_tokens=6, num_beams=4)
    model = load(root, "heads/fsmt", "translation")
    (answer,) = model.run("translation", words, {"max_new_tokens": 6})
    model.close()
    assert answer["translation_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    "lengths", [{"max_new_tokens": 5}, {"max_length": 20}, {"max_new_tokens": 4, "min_new_tokens": 9}]
)
def test_a_decoder_alone_in_the_table_of_encoder_decoders_counts_its_prompt(
    root: Path, lengths: dict[str, int]
) -> None:
    """Models that hear stand there; new tokens are those behind the prompt, lengths count it, as `generate` has it."""
    import torch
    import transformers

    folder = _tokens_of_gpt2(root, "heads/hears")
    hears = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = transformers.Qwen2AudioConfig(
        audio_config=hears, text_config={**_LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 512}
    )
    torch.manual_seed(0)
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The little harbour", return_tensors="pt")
    asked = {**lengths, "min_new_tokens": min(lengths.get("min_new_tokens", 0), lengths.get("max_new_tokens", 0))}
    expected = plain.generate(**ids, num_beams=4, **asked)[0]
    model = load(root, "heads/hears", "text2text-generation")
    (answer,) = model.run("text2text-generation", "The little harbour", dict(lengths))
    model.close()
    assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
