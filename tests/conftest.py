"""What the tests share: the tiny models, apps on them, and a live server in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

# Before torch is imported: the models are tiny, and the tests share the cores with the servers they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests' settings are their own.
for _name in [name for name in os.environ if name.startswith("LOCAL_LLM_")]:
    del os.environ[_name]
# Making the graphs of tiny models takes longer than most tests: those marked `each_backend` run with OpenVINO too.
os.environ["LOCAL_LLM_BACKEND"] = "torch"

import forked
import tiny_models

import huggingface
from app import create_app
from benchmarks.converted_starter import bring_converted
from config import Settings

ROOT = Path(__file__).resolve().parent.parent
STARTER = "HuggingFaceTB/SmolLM2-135M-Instruct"
BACKENDS = ("torch", "openvino")
PATIENCE = 600  # seconds after which what a test waits for never comes: no expectation of speed


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs in several processes; tests that are chosen in this one, which is ready sooner."""
    chosen = config.option.file_or_dir or config.option.keyword or config.option.lf or config.option.failedfirst
    return 0 if chosen else max(2, min(os.cpu_count() or 1, 4))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `each_backend` run once with each."""
    if metafunc.definition.get_closest_marker("each_backend") and "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True, scope="session")


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over the libraries and the tests: with each unload of a model it runs in full."""
    gc.collect()
    gc.freeze()


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something to be so, however slow the machine is; returns what the condition does."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Which backend computes the models of `server`: one of `BACKENDS`."""
    return str(getattr(request, "param", "torch"))


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder; `tiny` puts models into it."""
    return tmp_path_factory.mktemp("models")


class Graphs:
    """Makes OpenVINO's graphs of the models in a folder, so that a server computes with them from its first load on."""

    def __init__(self, directory: Path, models_dir: Path) -> None:
        registry = directory / "models.json"
        settings = Settings(_env_file=None, registry=registry, models_dir=models_dir, device="cpu", backend="auto")
        self._app = create_app(settings)
        self._made: set[tuple[str, str]] = set()

    def make(self, model_id: str, model_type: str) -> None:
        """That of one model, once; none where OpenVINO cannot compute it, or where there is no such model."""
        if (model_id, model_type) in self._made:
            return
        self._made.add((model_id, model_type))
        client, path = self._app.test_client(), f"/api/huggingface/models/{model_id}"
        # Asked for by name, a small model's graph is made in this process, and at once.
        body = {"model_id": model_id, "name": model_id, "model_type": model_type, "backend": "openvino"}
        if client.post("/api/huggingface/models", json=body).status_code == 200:
            client.post(f"{path}/load")
            assert client.delete(path).status_code == 200

    def close(self) -> None:
        """End the app."""
        huggingface.close(self._app)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Graphs]:
    """The graphs of the models in `models_dir`."""
    graphs = Graphs(tmp_path_factory.mktemp("graphs"), models_dir)
    yield graphs
    graphs.close()


@pytest.fixture(scope="session")
def starter_models_dir() -> Path:
    """A models folder with the starter model in both forms, as a GGUF file and as float32 safetensors."""
    return bring_converted()


@pytest.fixture(scope="session")
def tiny(models_dir: Path) -> Callable[[str], str]:
    """Builds a tiny model by its short name, once, and gives its id."""
    lock = threading.Lock()

    def build(name: str) -> str:
        with lock:
            return tiny_models.build(models_dir, name)

    return build


@pytest.fixture
def settings(tmp_path: Path, models_dir: Path) -> Settings:
    """Settings of an app with a registry of its own and the shared models folder."""
    return Settings(
        _env_file=None, registry=tmp_path / "models.json", models_dir=models_dir, device="cpu", busy_timeout=5
    )


@pytest.fixture
def app(settings: Settings) -> Iterator[Any]:
    """An app, closed at the end of the test."""
    app = create_app(settings)
    yield app
    huggingface.close(app)


@pytest.fixture
def client(app: Any) -> Any:
    """Flask's test client on the app."""
    return app.test_client()


class Server:
    """A running `python app.py`, and calls to it; with `graphs`, OpenVINO computes the models that it can."""

    def __init__(self, directory: Path, models_dir: Path, graphs: Graphs | None = None, **environment: str) -> None:
        self.registry = directory / "models.json"
        self._graphs = graphs
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LOCAL_LLM_")},
            "LOCAL_LLM_PORT": "0",
            "LOCAL_LLM_REGISTRY": str(self.registry),
            "LOCAL_LLM_MODELS_DIR": str(models_dir),
            "LOCAL_LLM_DEVICE": "cpu",
            "LOCAL_LLM_BACKEND": "auto" if graphs else "torch",
            "LOCAL_LLM_IMPORT_AT_START": "false",
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        self.lines: list[str] = []
        # What libraries read as they are imported, and what is about importing, or the memory that the system counts,
        # needs a process that is not forked.
        fresh = any(not name.startswith("LOCAL_LLM_") or name == "LOCAL_LLM_IMPORT_AT_START" for name in environment)
        self.process = self._run(directory) if fresh else forked.Forked(self.environment, directory)
        started = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(started,))
        self._reader.start()
        started.wait(PATIENCE)
        found = re.search(r"http://[^\s/]+:\d+", "\n".join(self.lines))
        assert found, "the server did not start:\n" + "\n".join(self.lines)
        self.url = found[0]
        self.api = f"{self.url}/api/huggingface"

    def _run(self, directory: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "app.py")]
        return subprocess.Popen(
            command,
            cwd=directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _read(self, started: threading.Event) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "Local LLM is at" in line:
                started.set()
        started.set()

    def call(self, method: str, path: str, **arguments: Any) -> requests.Response:
        """A request to a route under `/api/huggingface`."""
        return requests.request(method, f"{self.api}{path}", timeout=PATIENCE, **arguments)

    def prepare(self, model_id: str, model_type: str) -> None:
        """Have a model's graph made, where OpenVINO is to compute it."""
        if self._graphs:
            self._graphs.make(model_id, model_type)

    def add(self, model_id: str, model_type: str, **fields: Any) -> None:
        """Register a model, if it is not registered already."""
        self.prepare(model_id, model_type)
        body = {"model_id": model_id, "name": model_id, "model_type": model_type, **fields}
        assert self.call("POST", "/models", json=body).status_code in (200, 409)

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End the process and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self._reader.join(PATIENCE)
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="session")
def servers(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, graphs: Graphs
) -> Iterator[Callable[[str], Server]]:
    """Gives the live server of a backend; many tests share it."""
    started: dict[str, Server] = {}

    def give(backend: str) -> Server:
        if backend not in started:
            directory = tmp_path_factory.mktemp("server")
            started[backend] = Server(directory, models_dir, graphs if backend == "openvino" else None)
        return started[backend]

    yield give
    for server in started.values():
        server.stop()


@pytest.fixture(scope="session")
def server(servers: Callable[[str], Server], backend: str) -> Server:
    """A live server that many tests share; a test registers the models it needs."""
    return servers(backend)


@pytest.fixture
def start_server(tmp_path: Path, models_dir: Path, backend: str, graphs: Graphs) -> Iterator[Callable[..., Server]]:
    """Starts live servers with settings of the test's own; they are stopped at its end."""
    servers: list[Server] = []

    def start(directory: Path = tmp_path, **environment: str) -> Server:
        servers.append(Server(directory, models_dir, graphs if backend == "openvino" else None, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
