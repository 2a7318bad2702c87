"""Preflight: what a model is, told before its weights are read, equals what it is once it is loaded."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gguf_files
import numpy as np
import pytest
import tiny_models
from causal_models import build
from changed_models import copy, edit, load, sharded
from conftest import PATIENCE, ROOT
from embedding_models import build_embedding
from hub_place import Place
from loaded_parts import noted_models

from huggingface.errors import LoadError
from huggingface.inspection.headers import GGUF_TYPES, HeaderDamaged, gguf_header, safetensors_header
from huggingface.inspection.heads import AUTO_CLASSES, Heads
from huggingface.inspection.names import Names
from huggingface.inspection.preflight import Preflight
from huggingface.inspection.rules import context_of, count_parameters
from huggingface.registry.records import ModelRecord
from huggingface.tasks import HEADS, MODEL_TYPES, TASKS, canonical_task
from huggingface.tasks.positions import max_positions
from huggingface.types import LoadOptions

TYPE_OF = {
    "gpt2": "text-generation",
    "dialogpt": "text-generation",
    "llama": "conversational",
    "bart": "summarization",
    "t5": "text2text-generation",
    "marian": "translation",
    "mbart": "translation",
    "mbart50": "translation",
    "m2m100": "translation",
    "nllb": "translation",
    "bert-mlm": "fill-mask",
    "roberta-mlm": "fill-mask",
    "distilbert-sst2": "sentiment-analysis",
    "bert-ner": "token-classification",
    "bert-nli": "zero-shot-classification",
    "bert-qa": "question-answering",
    "roberta-qa": "question-answering",
    "canine-qa": "question-answering",
    "bert-embed": "feature-extraction",
    "tapas": "table-question-answering",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder of these tests' own."""
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture
def preflight(root: Path) -> Preflight:
    return Preflight(LoadOptions(root))


def looked(root: Path, model_id: str, *, gguf_file: str | None = None, **options: Any) -> dict[str, Any]:
    """What preflight tells of a model of the models folder; it holds no path of this machine."""
    details = Preflight(LoadOptions(root, **options)).look_at(model_id, gguf_file=gguf_file)
    assert not re.search(r"/(tmp|home|root|usr|work|var)\b", json.dumps(details))
    return details


# The tables of transformers -------------------------------------------------------------------------------------------


def test_the_tables_read_from_the_sources_are_those_that_transformers_has() -> None:
    from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

    names, imported = Names(), Heads(vars(modeling_auto))
    for head, auto_class in AUTO_CLASSES.items():
        assert hasattr(modeling_auto, auto_class)
        assert names.heads.every(head) == imported.every(head)
        for kind in configuration_auto.CONFIG_MAPPING_NAMES:
            assert names.heads.classes(head, kind) == imported.classes(head, kind)
    assert names.configs == configuration_auto.CONFIG_MAPPING_NAMES
    assert names.corrected_tokenizers == tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    known = {kind: name for kind, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items() if name is not None}
    assert known.items() <= names.tokenizers.items()  # with a name for those, too, whose packages are not installed


def test_the_head_of_every_architecture_is_the_same_by_the_source_and_by_the_imported_tables() -> None:
    from transformers.models.auto import configuration_auto, modeling_auto

    read, imported = Names().heads, Heads(vars(modeling_auto))
    picked = set()
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:
        own = [name for head in HEADS for name in imported.classes(head, kind)]
        for name in [*own, "OldLMHeadModel", "OldForPreTraining"]:
            for wanted in (None, *(each.heads for each in MODEL_TYPES.values())):
                found = read.pick(kind, [name], wanted, remote=(), encoder_decoder=False)
                assert found == imported.pick(kind, [name], wanted, remote=(), encoder_decoder=False)
                picked.add(found)
    assert picked == {None, *HEADS}


@pytest.mark.parametrize("kind", ["gpt2", "bart", "roberta", "t5", "llama", "xlnet", "opt", "mpnet", "bloom", "falcon"])
def test_what_a_config_leaves_out_has_the_value_that_its_class_gives_it(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    config, names = CONFIG_MAPPING[kind](), Names()
    assert names.config_defaults(kind).get("is_encoder_decoder", False) == config.is_encoder_decoder
    said = getattr(config, "max_position_embeddings", None)
    beyond = {"roberta": 2, "mpnet": 2}.get(kind, 0)
    assert context_of(names, {"model_type": kind}) == (said - beyond if said and said > 0 else None)


def test_the_gguf_architectures_are_those_that_transformers_reads() -> None:
    from transformers.integrations.gguf import GGUF_ARCHS, GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = Names()
    apart = {"general", "tokenizer", "tokenizer_config"}
    assert names.gguf == {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - apart
    assert names.gguf_by_itself == set(GGUF_ARCHS)
    assert all(
        names.reads_gguf(name) for name in ("llama", "qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2", "mistral3")
    )
    assert not names.reads_gguf("bert")


def test_the_gguf_types_are_those_of_the_format() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, (name, values, size) in GGUF_TYPES.items():
        kind = GGMLQuantizationType(number)
        assert (name, (values, size)) == (kind.name, GGML_QUANT_SIZES[kind])


def test_a_look_imports_neither_torch_nor_transformers(root: Path) -> None:
    copy(root, "llama", "light/llama")
    program = (
        "import sys; from pathlib import Path; from huggingface.inspection.preflight import Preflight\n"
        "from huggingface.types import LoadOptions\n"
        f"details = Preflight(LoadOptions(Path({str(root)!r}))).look_at('light/llama')\n"
        "assert details['known'] and details['parameters'], details\n"
        "print(*(name for name in ('torch', 'transformers', 'huggingface_hub', 'tokenizers') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_server_without_transformers_still_tells_what_the_files_tell(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(root, "llama", "light/alone")
    monkeypatch.setattr("huggingface.inspection.names.find_spec", lambda name: None)
    details = looked(root, "light/alone")
    assert details["known"] is None
    assert details["tasks"] == []
    assert "pip install transformers" in details["problem"]
    assert (details["architecture"], details["context_length"]) == ("LlamaForCausalLM", 512)
    assert details["parameters"] == 51360


def reads(model: Any) -> int | None:
    """How many tokens a loaded model can read, by its weights or by its config."""
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max_positions(model) or (said if said and said > 0 else None)


# Every tiny model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_what_is_told_of_a_model_is_what_it_is_once_loaded(root: Path, name: str) -> None:
    model_id = tiny_models.build(root, name)
    details = looked(root, model_id)
    assert details["problem"] is None
    assert (details["source"], details["reachable"], details["known"]) == ("local", True, True)
    assert details["model_type"] == TYPE_OF[name]
    assert details["model_type"] in MODEL_TYPES
    with noted_models() as read:
        model = load(root, model_id, details["model_type"])
    try:
        supported = {canonical_task(task) for task in model.tasks.supported}
        [inner] = read
        assert details["tasks"] == [task for task in TASKS if task in supported]
        # Marian's positions are computed; they are in the model, but in no checkpoint.
        computed = ("embed_positions.weight",) if name == "marian" else ()
        weights = [weight for key, weight in inner.named_parameters() if not key.endswith(computed)]
        assert details["parameters"] == sum(weight.numel() for weight in weights)
        assert details["context_length"] == reads(inner)
        assert details["dtype"] == str(inner.dtype).removeprefix("torch.")
        assert details["architecture"] == inner.config.architectures[0]
        assert details["config_type"] == inner.config.model_type
        assert details["chat_template"] == (model.chat.template is not None)
    finally:
        model.close()
    assert details["files"] == {"count": 1, "names": ["model.safetensors"]}
    assert details["weights_bytes"] == (root / model_id / "model.safetensors").stat().st_size
    assert details["missing_packages"] == []
    assert details["install"] is None


def test_a_second_look_reads_nothing_but_the_folder(root: Path) -> None:
    """What transformers can do is read once; each look costs no more than the model's own files."""
    copy(root, "bart", "light/bart")
    program = (
        "import sys; from pathlib import Path; from huggingface.inspection.preflight import Preflight\n"
        "from huggingface.types import LoadOptions\n"
        f"preflight = Preflight(LoadOptions(Path({str(root)!r})))\n"
        "preflight.look_at('light/bart')\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, given: event == 'open' and opened.append(str(given[0])))\n"
        "assert preflight.look_at('light/bart')['known']\n"
        "print(*sorted({path for path in opened if 'light/bart' not in path}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_weights_in_several_files_and_in_half_precision_are_counted_together(root: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = copy(root, "gpt2", "parts/gpt2")
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors")
    sharded(folder)
    details = looked(root, "parts/gpt2")
    assert details["problem"] is None
    assert details["files"]["count"] == 2
    assert (details["parameters"], details["dtype"]) == (50048, "float16")
    assert details["dtypes"] == {"float16": 2 * 50048}
    assert details["weights_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / details["files"]["names"][0]).unlink()
    assert "is missing" in looked(root, "parts/gpt2")["problem"]


def test_buffers_and_packed_weights_count_for_what_they_are() -> None:
    from huggingface.inspection.headers import Tensor

    tensors = {
        "h.0.attn.bias": Tensor("F32", (1, 1, 8, 8), 256),
        "embeddings.position_ids": Tensor("I64", (1, 8), 64),
        "h.0.mlp.weight": Tensor("F16", (4, 4), 32),
        "h.0.attn.c_attn.bias": Tensor("F16", (4,), 8),
    }
    assert count_parameters(tensors, None, 0) == 20
    packed = {"l.qweight": Tensor("I32", (4, 8), 128), "l.scales": Tensor("F16", (2, 8), 32)}
    assert count_parameters({**packed, "l.qzeros": Tensor("I32", (2, 1), 8)}, "gptq", 4) == 4 * 8 * 8


@pytest.mark.parametrize(
    ("name", "changes", "model_id", "model_type"),
    [
        ("gpt2", {"task_specific_params": {"conversational": {}}}, "types/talk", "conversational"),
        ("gpt2", {"architectures": None}, "types/unnamed", None),
        ("t5", {"task_specific_params": None}, "types/plain-t5", "text2text-generation"),
        ("t5", {"task_specific_params": None}, "types/t5-small-en-to-de", "translation"),
        ("t5", {"task_specific_params": None}, "types/t5-samsum", "summarization"),
        ("bart", {"task_specific_params": None}, "types/bart-base", "text2text-generation"),
        ("bart", {"task_specific_params": None}, "types/bart-large-cnn", "summarization"),
        ("t5", {"architectures": ["T5WithLMHeadModel"]}, "types/old-t5", "text2text-generation"),
        ("bert-mlm", {"architectures": ["BertForPreTraining"]}, "types/pretraining", "fill-mask"),
        ("bert-nli", {"id2label": {"0": "LABEL_0"}}, "types/cross-encoder", "text-classification"),
        ("bert-nli", {"id2label": {"0": "bad", "1": "good"}}, "types/classes", "sentiment-analysis"),
    ],
)
def test_the_type_is_the_one_that_fits_best(
    root: Path, name: str, changes: dict[str, Any], model_id: str, model_type: str | None
) -> None:
    edit(copy(root, name, model_id), **changes)
    details = looked(root, model_id)
    assert details["model_type"] == model_type
    assert details["problem"] is None


def test_the_head_of_weights_that_do_not_say_what_they_are_depends_on_the_registered_type(
    root: Path, preflight: Preflight
) -> None:
    edit(copy(root, "distilbert-sst2", "types/silent"), architectures=None)
    fits = preflight.look(ModelRecord("types/silent", "Silent", "sentiment-analysis"))
    assert (fits["problem"], fits["tasks"][0]) == (None, "text-classification")
    assert "architectures" in preflight.look(ModelRecord("types/silent", "Silent", "translation"))["problem"]


def test_chat_templates_are_found_wherever_they_are(root: Path) -> None:
    folder = copy(root, "gpt2", "chats/gpt2")
    assert not looked(root, "chats/gpt2")["chat_template"]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = looked(root, "chats/gpt2")
    assert (found["chat_template"], found["tools"], found["model_type"]) == (True, False, "conversational")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{% if tools %}{{ tools }}{% endif %}")
    assert looked(root, "chats/gpt2")["tools"]
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    edit(copy(root, "gpt2", "chats/named"), "tokenizer_config.json", chat_template=named)
    assert looked(root, "chats/named")["tools"]


def test_a_sentence_transformers_folder_is_for_vectors(models_dir: Path, tiny: Callable[[str], str]) -> None:
    details = looked(models_dir, build_embedding(models_dir, tiny, "mean"))
    assert (details["embedding"], details["model_type"]) == (True, "feature-extraction")
    assert details["problem"] is None


# What keeps a model from being loaded ---------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def broken(name: str, content: str = "{") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def without(*names: str) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                path.unlink()

    return take


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "config": (broken("config.json"), "config.json is damaged"),
    "list": (broken("config.json", "[]"), "not a JSON object"),
    "tokenizer-config": (broken("tokenizer_config.json"), "tokenizer_config.json is damaged"),
    "pointer": (broken("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "cut": (cut, "damaged or incomplete"),
    "no-weights": (without("model.safetensors"), "no weights"),
    "no-config": (without("config.json"), "no config.json"),
    "no-tokenizer": (without("tokenizer*", "vocab*", "merges*"), "no tokenizer"),
    "pickles": (pickled, "LOCAL_LLM_ALLOW_PICKLE"),
    "unknown": (lambda folder: edit(folder, model_type="nobody_knows"), "does not know this kind of model"),
    "unnamed": (lambda folder: edit(folder, model_type=None), "does not know this kind of model"),
    "no-task": (
        lambda folder: edit(folder, architectures=["GPT2DoubleHeadsModel"]),
        "none of this server's text tasks",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_problem_is_told_as_the_load_would_tell_it(root: Path, damage: str) -> None:
    spoil, words = DAMAGES[damage]
    spoil(copy(root, "gpt2", f"damaged/{damage}"))
    details = looked(root, f"damaged/{damage}")
    assert words in details["problem"]
    assert details["reachable"] is True
    with pytest.raises(LoadError) as refused:
        load(root, f"damaged/{damage}", "text-generation")
    assert details["problem"] == str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": "GPT2LMHeadModel", "model_type": 7, "id2label": [], "auto_map": [], "text_config": 3},
        {"architectures": [None], "model_type": "gpt2", "n_positions": "many", "quantization_config": {"bits": "x"}},
        {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "id2label": {"0": 3}},
        {"model_type": "roberta", "max_position_embeddings": 1, "pad_token_id": None, "task_specific_params": [1]},
    ],
)
def test_a_config_of_nonsense_is_looked_at_without_an_error(root: Path, config: dict[str, Any]) -> None:
    folder = copy(root, "gpt2", "nonsense/model")
    (folder / "config.json").write_text(json.dumps(config))
    details = looked(root, "nonsense/model")
    assert details["reachable"] is True
    assert "could not be inspected" not in (details["problem"] or "")


def test_a_model_with_code_of_its_own_needs_trust(root: Path) -> None:
    folder = copy(root, "gpt2", "code/own")
    edit(folder, model_type="owns", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (folder / "own.py").write_text(
        "import json\nimport torch\nfrom . import beside\nfrom .beside import that\nimport no_such_package.part\n"
        "try:\n    import neither_this\nexcept ImportError:\n    pass\n"
    )
    (folder / "beside.py").write_text("def that():\n    import nor_that_one\n")
    details = looked(root, "code/own")
    assert (details["needs_remote_code"], details["known"]) == (True, False)
    assert "LOCAL_LLM_TRUST_REMOTE_CODE=code/own" in details["problem"]
    trusted = looked(root, "code/own", trust_remote_code=frozenset({"code/own"}))
    assert trusted["missing_packages"] == ["no_such_package", "nor_that_one"]
    assert trusted["install"] == "pip install no_such_package nor_that_one"
    assert trusted["tasks"][0] == "text-generation"
    edit(folder, model_type="gpt2")  # of a kind that transformers has itself
    assert looked(root, "code/own")["needs_remote_code"] is False


@pytest.mark.parametrize(
    ("name", "file", "changes", "packages"),
    [
        ("gpt2", "config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["gptqmodel", "optimum"]),
        ("gpt2", "config.json", {"quantization_config": {"quant_method": "awq"}}, ["gptqmodel"]),
        ("gpt2", "tokenizer_config.json", {"tokenizer_class": "FSMTTokenizer"}, ["sacremoses"]),
        ("marian", "tokenizer_config.json", {}, []),
    ],
)
def test_packages_that_are_not_installed_are_named(
    root: Path, name: str, file: str, changes: dict[str, Any], packages: list[str]
) -> None:
    from huggingface.inspection.packages import missing

    model_id = f"packages/{name}-{'-'.join(packages) or 'none'}"
    edit(copy(root, name, model_id), file, **changes)
    details = looked(root, model_id)
    assert details["missing_packages"] == missing(packages)
    assert bool(details["install"]) == bool(details["missing_packages"])
    if details["install"]:
        assert details["install"] in details["problem"]
    if "quantization_config" in changes:
        assert details["quantized"] == changes["quantization_config"]["quant_method"]


def test_the_packages_of_a_quantization_are_those_that_transformers_asks_for() -> None:
    """Wherever a quantizer refuses for want of a package, preflight names one that is not installed."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from huggingface.inspection.packages import missing, quantizer_packages

    names = Names()
    for method, quantizer in AUTO_QUANTIZER_MAPPING.items():
        made = object.__new__(quantizer)
        made.quantization_config = MagicMock()
        made.pre_quantized = True
        try:
            made.validate_environment(device_map=None)
        except ImportError:
            assert missing(quantizer_packages(names, method)), method
        except Exception:  # noqa: BLE001 - it asks for a GPU, or for more of its settings
            continue
    assert quantizer_packages(names, "bitsandbytes") == {"accelerate", "bitsandbytes"}
    assert quantizer_packages(names, "quanto") == {"accelerate", "optimum-quanto"}
    assert quantizer_packages(names, "compressed-tensors") == {"compressed-tensors"}
    assert quantizer_packages(names, "a(method") == quantizer_packages(names, None) == set()


def test_an_adapter_names_its_base(root: Path) -> None:
    folder = root / "adapters" / "lora"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )
    from safetensors.numpy import save_file

    save_file({"a.lora_A.weight": np.zeros((2, 4), np.float32)}, folder / "adapter_model.safetensors")
    details = looked(root, "adapters/lora")
    assert (details["adapter"], details["parameters"]) == ("org/base", 8)
    assert "adapter" in details["problem"]
    edit(folder, "adapter_config.json", base_model_name_or_path="/somewhere/secret/base")
    assert looked(root, "adapters/lora")["adapter"] == "base"


def test_an_id_that_cannot_be_one_is_a_problem_and_no_error(preflight: Preflight) -> None:
    for model_id in ("../../etc", "a/b/c", "", "x\0y"):
        details = preflight.look_at(model_id)
        assert details["reachable"] is False
        assert "model_id" in details["problem"]
    for name in ("../x.gguf", "/etc/x.gguf", "model.bin"):
        assert "no GGUF file" in preflight.look_at("tiny/gpt2", gguf_file=name)["problem"]


# GGUF -----------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str = "llama", words: int = 40) -> None:
    """A GGUF file as llama.cpp writes it: keys, a vocabulary, a chat template, tensors of two types."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(2048)
    writer.add_block_count(1)
    writer.add_token_list([f"word{number}" for number in range(words)])
    writer.add_token_scores([0.0] * words)
    writer.add_array("nested", [[1, 2], [3, 4]])
    writer.add_chat_template("{% if tools %}{{ tools }}{% endif %}{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((words, 64), np.float32))
    values = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    kind = GGMLQuantizationType.Q4_0
    writer.add_tensor("blk.0.attn_q.weight", quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_tells_what_it_is(root: Path) -> None:
    path = root / "gguf" / "model" / "model.Q4_0.gguf"
    write_gguf(path)
    details = looked(root, "gguf/model", gguf_file=path.name)
    assert details["problem"] is None
    assert (details["architecture"], details["context_length"], details["known"]) == ("llama", 2048, True)
    assert details["parameters"] == 40 * 64 + 64 * 256 + 64
    assert details["dtypes"] == {"float32": 40 * 64 * 4 + 256, "Q4_0": 64 * 256 // 32 * 18}
    assert (details["quantized"], details["weights_bytes"]) == ("gguf", path.stat().st_size)
    assert (details["chat_template"], details["tools"]) == (True, True)
    assert details["model_type"] == "conversational"
    assert details["tasks"] == ["text-generation", "feature-extraction"]
    assert "name one in gguf_file: model.Q4_0.gguf" in looked(root, "gguf/model")["problem"]
    assert "there is no" in looked(root, "gguf/model", gguf_file="other.gguf")["problem"]
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or incomplete" in looked(root, "gguf/model", gguf_file=path.name)["problem"]
    path.write_bytes(b"GGUF and nothing more")
    assert "damaged or incomplete" in looked(root, "gguf/model", gguf_file=path.name)["problem"]


def test_a_gguf_file_of_an_architecture_that_transformers_does_not_read_is_a_problem(root: Path) -> None:
    write_gguf(root / "gguf" / "other" / "model.gguf", "no-such")
    details = looked(root, "gguf/other", gguf_file="model.gguf")
    assert (details["known"], details["tasks"]) == (False, [])
    assert "'no-such'" in details["problem"]


def test_a_header_longer_than_may_be_read_gives_what_comes_before(tmp_path: Path) -> None:
    write_gguf(tmp_path / "long.gguf", words=20_000)
    content = (tmp_path / "long.gguf").read_bytes()
    header = gguf_header(lambda start, length: content[start : start + length], maximum=100_000)
    assert header.values["llama.context_length"] == 2048
    assert header.tensors is None
    whole = gguf_header(lambda start, length: content[start : start + length], maximum=10_000_000)
    assert (whole.end, whole.values["tokenizer.ggml.tokens"]) == (len(content), 20_000)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"GGUF\x01\0\0\0" + b"\0" * 16])
def test_what_is_no_header_is_said_to_be_damaged(content: bytes) -> None:
    with pytest.raises(HeaderDamaged):
        gguf_header(lambda start, length: content[start : start + length], maximum=1 << 20)
    for start in (b"", b"\xff" * 9, b"\x02\0\0\0\0\0\0\0[]", b"\x0f\0\0\0\0\0\0\0" + b'{"a": {"x": 1}}'):
        with pytest.raises(HeaderDamaged):
            safetensors_header(lambda first, length, start=start: start[first : first + length])


# The Hub --------------------------------------------------------------------------------------------------------------


class Looker:
    """A process that looks at models; it knows one Hub only."""

    def __init__(self, place: Place, home: str = "home", **environment: str) -> None:
        program = (
            "import sys, json; from pathlib import Path\n"
            "from huggingface.inspection.preflight import Preflight; from huggingface.types import LoadOptions\n"
            "given = json.loads(sys.argv[2])\n"
            "preflight = Preflight(LoadOptions(Path(sys.argv[1]), **given), timeout=4)\n"
            "for line in sys.stdin: print(json.dumps(preflight.look_at(**json.loads(line))), flush=True)\n"
        )
        given = environment.pop("options", "{}")
        environment = place.hub.environment(place.directory / home, **environment)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(place.local), given],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def look(self, model_id: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"model_id": model_id, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert not re.search(r"/(tmp|home|root|usr|work|var)\b", line)
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"), root)
    with place.hub:
        yield place


@pytest.fixture(scope="module")
def ranges(place: Place) -> list[tuple[str, str]]:
    """The pieces of weights that were asked for: the file, and the bytes."""
    return place.hub.spans


@pytest.fixture(scope="module")
def looker(place: Place) -> Iterator[Looker]:
    looker = Looker(place)
    yield looker
    looker.close()


def header_size(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("api", [True, False])
def test_of_a_model_on_the_hub_only_small_files_and_headers_are_fetched(
    place: Place, looker: Looker, root: Path, ranges: list[tuple[str, str]], api: bool
) -> None:
    model_id = f"org/remote-{'api' if api else 'files'}"
    repository = place.publish(model_id, "llama")
    repository.api = api
    ranges.clear()
    with place.hub.recording() as made:
        details = looker.look(model_id)
    local = looked(root, tiny_models.build(root, "llama"))
    differing = {name for name in local if details[name] != local[name]}
    assert differing == {"source", "commit"}
    assert (details["source"], details["commit"]) == ("hub", repository.commit)
    size = header_size(repository.folder / "model.safetensors")
    asked = {span for name, span in ranges if name == "model.safetensors"}
    assert asked == {"bytes=0-7", f"bytes=8-{size + 7}"}
    assert "tokenizer.json" not in {request.file for request in made if request.start == 0 and api}
    assert not place.cached(model_id).exists()


def test_the_headers_of_several_files_are_read(place: Place, looker: Looker, ranges: list[tuple[str, str]]) -> None:
    repository = place.publish("org/remote-parts", "gpt2")
    sharded(repository.folder)
    ranges.clear()
    details = looker.look("org/remote-parts")
    assert (details["parameters"], details["files"]["count"]) == (50048, 2)
    assert details["problem"] is None
    longest = max(header_size(path) for path in repository.folder.glob("*.safetensors"))
    assert all(int(span.rpartition("-")[2]) <= longest + 7 for _, span in ranges)
    (repository.folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in looker.look("org/remote-parts")["problem"]


def test_a_hub_that_sends_no_pieces_leaves_the_sizes_open(place: Place, looker: Looker) -> None:
    repository = place.publish("org/remote-whole", "gpt2")
    repository.whole = frozenset({"model.safetensors"})
    details = looker.look("org/remote-whole")
    assert (details["problem"], details["parameters"]) == (None, None)
    assert details["model_type"] == "text-generation"
    assert details["weights_bytes"] == (repository.folder / "model.safetensors").stat().st_size


def test_a_revision_is_looked_at_where_one_is_named(place: Place, looker: Looker, root: Path) -> None:
    repository = place.publish("org/remote-branches", "gpt2")
    branch = place.directory / "branch"
    shutil.copytree(root / tiny_models.build(root, "llama"), branch)
    repository.revisions["chat/2"] = branch
    assert looker.look("org/remote-branches")["config_type"] == "gpt2"
    assert looker.look("org/remote-branches", revision="chat/2")["config_type"] == "llama"
    missing = looker.look("org/remote-branches", revision="nowhere")
    assert (missing["reachable"], "nowhere" in missing["problem"]) == (False, True)


def test_a_gguf_file_on_the_hub_is_read_from_its_head(
    place: Place, looker: Looker, ranges: list[tuple[str, str]]
) -> None:
    path = place.hub.root / "org" / "remote-gguf" / "quants" / "model.gguf"
    write_gguf(path, words=60_000)
    (place.hub.root / "org" / "remote-gguf" / "README.md").write_text("A model.")
    ranges.clear()
    details = looker.look("org/remote-gguf", gguf_file="quants/model.gguf")
    assert details["problem"] is None
    assert (details["context_length"], details["tools"], details["quantized"]) == (2048, True, "gguf")
    assert details["parameters"] == 60_000 * 64 + 64 * 256 + 64
    assert details["weights_bytes"] == path.stat().st_size
    last = max(int(span.rpartition("-")[2]) for _, span in ranges)
    assert last < path.stat().st_size / 2, "its weights stay where they are"
    assert looker.look("org/remote-gguf")["gguf_files"] == ["quants/model.gguf"]


def test_a_gguf_file_in_parts_on_the_hub_is_read_from_their_heads(place: Place, looker: Looker) -> None:
    """All files that the record needs are told, and the one that is missing."""
    model, tokenizer = build("llama")
    folder = place.hub.root / "org" / "remote-parts" / "quants"
    folder.mkdir(parents=True)
    (folder.parent / "README.md").write_text("A model.")
    paths = gguf_files.write_gguf(folder / "model.gguf", model, tokenizer, "llama", part=11)
    names = [f"quants/{path.name}" for path in paths]
    assert len(names) == 2
    for name in names:
        details = looker.look("org/remote-parts", gguf_file=name)
        assert details["problem"] is None
        assert details["files"] == {"count": 2, "names": names}
        assert details["weights_bytes"] == sum(path.stat().st_size for path in paths)
        assert details["parameters"] == sum(each.numel() for each in model.parameters())
        assert details["architecture"] == "llama"
    assert looker.look("org/remote-parts")["gguf_files"] == names[:1]
    paths[1].unlink()
    assert f"there is no {names[1]} among its files" in looker.look("org/remote-parts", gguf_file=names[0])["problem"]
    place.hub.repository("org/remote-parts").api = False
    assert names[1] in looker.look("org/remote-parts", gguf_file=names[0])["problem"]


def test_why_a_model_on_the_hub_cannot_be_looked_at_is_told(place: Place, looker: Looker) -> None:
    gated = place.publish("org/remote-gated")
    gated.gated = True
    private = place.publish("org/remote-private")
    private.private = True
    expected = {
        "org/remote-gated": "gated",
        "org/remote-private": "no repository on the Hub that this server may read",
        "org/remote-nobody": "no repository on the Hub that this server may read",
    }
    for model_id, words in expected.items():
        details = looker.look(model_id)
        assert details["reachable"] is False
        assert words in details["problem"]
        assert (details["source"], details["tasks"], details["model_type"]) == (None, [], None)


@pytest.mark.parametrize("damage", ["config", "tokenizer-config", "pickles", "no-weights", "unknown", "no-tokenizer"])
def test_problems_of_a_model_on_the_hub_are_those_of_a_folder(place: Place, looker: Looker, damage: str) -> None:
    spoil, words = DAMAGES[damage]
    repository = place.publish(f"org/remote-{damage}", "gpt2")
    spoil(repository.folder)
    details = looker.look(f"org/remote-{damage}")
    assert words in details["problem"]
    assert details["reachable"] is True
    if damage == "pickles":
        assert details["files"] == {"count": 1, "names": ["pytorch_model.bin"]}


def test_what_the_cache_holds_whole_is_looked_at_there_and_nothing_is_sent(place: Place) -> None:
    place.publish("org/remote-cached", "gpt2")
    fetch = "import sys; from huggingface_hub import snapshot_download; snapshot_download('org/remote-cached')"
    environment = {"PATH": "/usr/bin:/bin", **place.hub.environment(place.home)}
    subprocess.run([sys.executable, "-c", fetch], env=environment, check=True, capture_output=True, timeout=PATIENCE)
    looker = Looker(place)
    with place.hub.recording() as made:
        details = looker.look("org/remote-cached")
    looker.close()
    assert made == []
    assert (details["source"], details["problem"], details["parameters"]) == ("cache", None, 50048)
    assert details["commit"] == place.snapshot("org/remote-cached").name
    part = place.snapshot("org/remote-cached") / "model.safetensors"
    part.resolve().unlink()
    part.unlink()
    offline = Looker(place, HF_HUB_OFFLINE="1")
    with place.hub.recording() as made:
        details = offline.look("org/remote-cached")
    offline.close()
    assert made == []
    assert (details["source"], details["config_type"], details["parameters"]) == ("cache", "gpt2", None)
    assert "switched off" in details["problem"]


def test_adapters_on_the_hub_are_looked_at_by_their_config_and_head(
    place: Place, looker: Looker, ranges: list[tuple[str, str]]
) -> None:
    from safetensors.numpy import save_file

    place.publish("org/remote-base", "llama")
    folder = place.hub.root / "org/remote-lora"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": np.ones((2, 32), "f4"), f"{name}.lora_B.weight": np.ones((32, 2), "f4")},
        folder / "adapter_model.safetensors",
    )
    place.hub.repository("org/remote-lora")

    def told(**changes: Any) -> Any:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return looker.look("org/remote-base", adapters={"one": "org/remote-lora"})["adapters"]["one"]

    ranges.clear()
    assert told() is None
    assert all(span != "all of it" for _, span in ranges)
    assert "of rank 2" in told(r=4)
    assert "only LORA" in told(peft_type="IA3")
    assert "the base's biases" in told(bias="all")
    save_file(
        {f"{name}.lora_A.weight": np.ones((2, 48), "f4"), f"{name}.lora_B.weight": np.ones((32, 2), "f4")},
        folder / "adapter_model.safetensors",
    )
    assert "belongs to another base" in told()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert told().startswith("Adapter 'one' of model 'org/remote-base' has pickled weights only")


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "options"])
def test_offline_nothing_is_sent(place: Place, how: str) -> None:
    place.publish(f"org/remote-{how.lower()}")
    looker = Looker(place, **{how: "1" if how == "HF_HUB_OFFLINE" else '{"offline": true}'})
    with place.hub.recording() as made:
        details = looker.look(f"org/remote-{how.lower()}")
    looker.close()
    assert made == []
    assert details["reachable"] is False
    assert "switched off" in details["problem"]


def test_a_hub_that_is_away_is_not_asked_again_at_once(place: Place) -> None:
    place.publish("org/remote-silent").silent = frozenset({"config.json"})
    with contextlib.closing(Looker(place)) as looker:
        details = looker.look("org/remote-silent")
        assert "cannot be reached" in details["problem"]
        place.publish("org/remote-silent-too").silent = frozenset({"config.json"})
        details = looker.look("org/remote-silent-too")
        assert "cannot be reached" in details["problem"]  # one alone may be slow by itself
        with place.hub.recording() as made:
            details = looker.look("org/remote-other")
    assert made == []
    assert "'org/remote-other'" in details["problem"]
    assert "cannot be reached" in details["problem"]
    with contextlib.closing(Looker(place, HF_ENDPOINT="http://127.0.0.1:9")) as nowhere:
        assert "cannot be reached" in nowhere.look("org/remote-other")["problem"]


def test_one_repository_that_is_slow_does_not_speak_for_the_others(place: Place) -> None:
    place.publish("org/remote-slow").silent = frozenset({"config.json"})
    place.publish("org/remote-quick")
    looker = Looker(place)
    assert "cannot be reached" in looker.look("org/remote-slow")["problem"]
    assert looker.look("org/remote-quick")["reachable"] is True
    looker.close()


def test_a_hub_that_is_out_of_order_is_told_of_and_asked_again(place: Place) -> None:
    place.publish("org/remote-order")
    looker = Looker(place)
    place.hub.down = 503
    try:
        details = looker.look("org/remote-order")
    finally:
        place.hub.down = None
    assert "503" in details["problem"]
    assert looker.look("org/remote-order")["problem"] is None
    looker.close()


# The routes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, root: Path) -> Path:
    """A models folder with what may lie in one."""
    shelf = tmp_path / "shelf"
    gpt2, llama = (root / tiny_models.build(root, name) for name in ("gpt2", "llama"))
    shutil.copytree(gpt2, shelf / "alone")
    shutil.copytree(llama, shelf / "org" / "chat-model_1")
    (shelf / "org" / "linked").symlink_to(gpt2)
    write_gguf(shelf / "org" / "quantized" / "model.gguf")
    shutil.copytree(gpt2, shelf / "org" / "no-json")
    (shelf / "org" / "no-json" / "config.json").write_text("{")
    adapter = shelf / "org" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/chat-model_1"}))
    (adapter / "adapter_model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes())
    # And what is no model: hidden, empty, broken off, misnamed, a link to nowhere, a file.
    shutil.copytree(gpt2, shelf / ".hidden")
    shutil.copytree(gpt2, shelf / "org" / ".cache")
    shutil.copytree(gpt2, shelf / "org" / "not an id")
    (shelf / "org" / "empty").mkdir()
    shutil.copytree(gpt2, shelf / "org" / "begun")
    (shelf / "org" / "begun" / "model.safetensors").unlink()
    shutil.copytree(gpt2, shelf / "org" / "half")
    cut(shelf / "org" / "half")
    (shelf / "org" / "nowhere").symlink_to(tmp_path / "gone")
    (shelf / "notes.txt").write_text("hello")
    return shelf


def test_the_models_folder_is_listed(settings: Any, shelf: Path) -> None:
    import huggingface
    from app import create_app

    app = create_app(settings.model_copy(update={"models_dir": shelf}))
    try:
        client = app.test_client()
        body = {"model_id": "alone", "name": "Alone", "model_type": "text-generation"}
        assert client.post("/api/huggingface/models", json=body).status_code == 200
        body["model_id"] = "available"
        assert client.post("/api/huggingface/models", json=body).status_code == 200
        answer = client.get("/api/huggingface/models/available").get_json()
        models = {entry["model_id"]: entry for entry in answer["models"]}
        ids = ["adapter", "chat-model_1", "linked", "no-json", "quantized"]
        assert list(models) == ["alone", *(f"org/{name}" for name in ids)]
        assert answer["count"] == len(models)
        assert [entry["model_id"] for entry in answer["models"] if entry["registered"]] == ["alone"]
        chat = models["org/chat-model_1"]
        assert (chat["name"], chat["model_type"], chat["problem"]) == ("chat model 1", "conversational", None)
        assert chat["bytes"] == sum(path.stat().st_size for path in (shelf / "org" / "chat-model_1").iterdir())
        assert models["org/quantized"]["gguf_files"] == ["model.gguf"]
        assert models["org/quantized"]["model_type"] == "conversational"
        assert models["org/adapter"]["adapter"] == "org/chat-model_1"
        assert "damaged" in models["org/no-json"]["problem"]
        assert "details" not in chat
        answer = client.get("/api/huggingface/models/available?details=true").get_json()
        assert answer["models"][2]["details"]["config_type"] == "llama"
    finally:
        huggingface.close(app)


def test_a_model_is_looked_at_whether_it_is_registered_or_not(client: Any, tiny: Callable[[str], str]) -> None:
    model_id = tiny("llama")
    for path in (model_id, model_id.replace("/", "%2F")):
        answer = client.get(f"/api/huggingface/models/{path}/preflight")
        assert answer.status_code == 200
        body = answer.get_json()
        assert (body["success"], body["model_id"]) == (True, model_id)
        assert body["details"]["model_type"] == "conversational"
    registered = {"model_id": model_id, "name": "Llama", "model_type": "conversational", "gguf_file": "none.gguf"}
    assert client.post("/api/huggingface/models", json=registered).status_code in (200, 201, 422)
    assert client.get("/api/huggingface/models/a/b/c/preflight").status_code == 400
    assert client.get(f"/api/huggingface/models/{model_id}/preflight?revison=x").status_code == 400
    answer = client.get(f"/api/huggingface/models/{model_id}/preflight?gguf_file=none.gguf").get_json()
    assert "none.gguf" in answer["details"]["problem"]


def test_the_answers_are_as_the_document_says(client: Any, tiny: Callable[[str], str]) -> None:
    from huggingface.api.documented.preflight_schemas import AvailableAnswer, Details, PreflightAnswer

    answer = client.get(f"/api/huggingface/models/{tiny('bart')}/preflight").get_json()
    PreflightAnswer.model_validate(answer)
    assert set(answer["details"]) <= set(Details.model_fields)
    AvailableAnswer.model_validate(client.get("/api/huggingface/models/available?details=true").get_json())
