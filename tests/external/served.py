"""The server that the programs talk to: the real one, on a free port, with tiny models, and how scripts learn of them.

Everything lies in a temporary folder that goes with it. It knows models and settings, no program.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import agent_model
import tiny_models
from conftest import Server

# The tiny models by the variable that names them, and their types.
MODELS = {
    "TEXT_MODEL": ("llama", "text-generation"),
    "EMBEDDING_MODEL": ("bert-embed", "feature-extraction"),
    "SUMMARY_MODEL": ("bart", "summarization"),
    "TRANSLATION_MODEL": ("t5", "translation"),
    "QUESTION_MODEL": ("bert-qa", "question-answering"),
    "MASK_MODEL": ("bert-mlm", "fill-mask"),
    "CLASS_MODEL": ("distilbert-sst2", "text-classification"),
    "ENTITY_MODEL": ("bert-ner", "token-classification"),
    "ZERO_SHOT_MODEL": ("bert-nli", "zero-shot-classification"),
    "TABLE_MODEL": ("tapas", "table-question-answering"),
}


@contextlib.contextmanager
def server() -> Iterator[dict[str, str]]:
    """A running server; what comes is the environment of the scripts: its address, and ids of models."""
    with tempfile.TemporaryDirectory(prefix="local-llm-clients-") as scratch:
        models = Path(scratch) / "models"
        models.mkdir()
        kinds = {name: (tiny_models.build(models, short), kind) for name, (short, kind) in MODELS.items()}
        kinds["AGENT_MODEL"] = (agent_model.build(models), "conversational")
        # The same model by a name without an organization: some libraries cut a name at its last slash.
        shutil.copytree(models / agent_model.MODEL_ID, models / "agent")
        kinds["SHORT_MODEL"] = ("agent", "conversational")
        running = Server(Path(scratch), models)
        try:
            for model_id, kind in kinds.values():
                running.add(model_id, kind)
            ids = {name: model_id for name, (model_id, _) in kinds.items()}
            yield {"LOCAL_LLM_URL": running.url, "MODELS_FOLDER": str(models), **ids}
        finally:
            running.stop()
