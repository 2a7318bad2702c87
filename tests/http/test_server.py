"""The process around the app: how it starts, what it refuses before any route, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from conftest import PATIENCE, ROOT, STARTER, until

from config import Settings

MISSING = "Transformers library not available. Please install: pip install transformers torch"


def send(url: str, data: bytes) -> tuple[int, Any]:
    """Bytes on a socket, and the answer's status and JSON body."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_cold_server_answers_before_its_libraries_are_imported(start_server: Any, tmp_path: Path) -> None:
    """While torch's import, which takes seconds, is under way, whatever needs no model is answered."""
    begun, allowed = tmp_path / "begun", tmp_path / "allowed"
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        f"Path({str(begun)!r}).touch()\n"
        f"while not Path({str(allowed)!r}).exists():\n"
        "    time.sleep(0.01)\n"
        "raise ImportError('held')\n"
    )
    server = start_server(LOCAL_LLM_IMPORT_AT_START="true", PYTHONPATH=str(tmp_path))
    try:
        until(begun.exists)
        assert requests.get(server.url, timeout=PATIENCE).status_code == 200
        for path in ("/models", "/cache", "/statistics"):
            assert server.call("GET", path).status_code == 200
    finally:
        allowed.touch()


def test_get_root_says_what_is_running(server: Any, tiny: Any) -> None:
    """GET / names the server, its version, uptime, device and loaded models."""
    model_id = tiny("gpt2")
    server.add(model_id, "text-generation")
    server.call("POST", f"/models/{model_id}/load")
    answer = requests.get(server.url, timeout=PATIENCE).json()
    assert answer["success"] is True
    assert answer["name"] == "Local LLM"
    assert answer["version"]
    assert answer["uptime_seconds"] > 0
    assert answer["device"] == "cpu"
    assert model_id in answer["loaded_models"]


def test_without_torch_the_registry_works_and_models_say_what_to_install(start_server: Any, tmp_path: Path) -> None:
    """Where torch and transformers are missing, every route but those that run a model works."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "transformers"):
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')")
    server = start_server(PYTHONPATH=str(blocked), LOCAL_LLM_IMPORT_AT_START="true")
    assert requests.get(server.url, timeout=PATIENCE).status_code == 200
    assert server.call("GET", "/dependencies").json()["dependencies"] == {
        "transformers": False,
        "torch": False,
        "cuda_available": False,
    }
    server.add("gpt2", "text-generation")
    assert server.call("GET", "/models/gpt2").status_code == 200
    assert server.call("PUT", "/models/gpt2", json={"description": "x"}).status_code == 200
    for path, body in (
        ("/models/gpt2/load", None),
        ("/generate", {"model_id": "gpt2", "prompt": "x"}),
        ("/pipeline", {"model_id": "gpt2", "task": "text-generation", "inputs": "x"}),
    ):
        answer = server.call("POST", path, json=body)
        assert (answer.status_code, answer.json()) == (400, {"success": False, "error": MISSING})
    for method, path in (("GET", "/cache"), ("DELETE", "/cache"), ("GET", "/statistics"), ("DELETE", "/models/gpt2")):
        assert server.call(method, path).status_code == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: evil.example\r\n\r\n", 403),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: ten\r\n\r\n", 400),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
    ],
)
def test_even_what_is_no_request_gets_the_documented_body(server: Any, request_bytes: bytes, status: int) -> None:
    """What the HTTP server refuses before any route has the same error body as all the rest."""
    assert send(server.url, request_bytes)[0] == status
    body = send(server.url, request_bytes)[1]
    assert body["success"] is False
    assert body["error"]


def test_an_oversized_body_is_a_413_that_its_sender_can_read(server: Any) -> None:
    """A body over the limit is refused with JSON after it was sent, not by a broken connection."""
    data = b'{"model_id": "' + b"x" * (40 * 2**20) + b'"}'
    answer = server.call("POST", "/generate", data=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["success"] is False


def test_sigterm_ends_the_server_and_loses_no_count(start_server: Any, tiny: Any) -> None:
    """SIGTERM ends the process at once with status 0, and the usage counters are in the file."""
    server = start_server()
    model_id = tiny("gpt2")
    server.add(model_id, "text-generation")
    assert server.call("POST", f"/models/{model_id}/load").status_code == 200
    for _ in range(3):
        server.call("POST", "/generate", json={"model_id": model_id, "prompt": "x", "max_new_tokens": 1})
    assert server.stop(signal.SIGTERM) == 0
    assert json.loads(server.registry.read_text())["models"][0]["usage_count"] == 3


def test_sigterm_in_the_middle_of_a_generation_ends_it(start_server: Any, tiny: Any) -> None:
    """A running generation does not keep the process alive."""
    server = start_server()
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    server.call("POST", f"/models/{model_id}/load")
    body = {"model_id": model_id, "prompt": "x", "do_sample": False, "num_beams": 24, "min_new_tokens": 480}

    def ask() -> None:
        with contextlib.suppress(requests.ConnectionError):
            server.call("POST", "/generate", json={**body, "max_new_tokens": 490})

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.call("GET", "/requests").json()["count"] == 1)
    assert server.stop(signal.SIGTERM) == 0
    thread.join()


def test_a_server_whose_output_is_no_longer_read_loads_models_and_answers(
    tmp_path: Path, models_dir: Path, tiny: Any
) -> None:
    """As of `python app.py 2>&1 | head`: what writes to a closed pipe fails, and is not in the way of anything."""
    model_id = tiny("llama")
    settings = {"PORT": "0", "REGISTRY": str(tmp_path / "r.json"), "MODELS_DIR": str(models_dir), "ENGINE": "torch"}
    environment = {**os.environ, **{f"LOCAL_LLM_{key}": value for key, value in settings.items()}}
    program = [sys.executable, "-u", str(ROOT / "app.py")]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        address = next(line for line in process.stdout if "Local LLM is at" in line).split()[4]
        process.stdout.close()
        try:
            fields = {"model_id": model_id, "name": "x", "model_type": "text-generation"}
            assert requests.post(f"{address}/api/huggingface/models", json=fields, timeout=PATIENCE).status_code == 200
            body = {"model_id": model_id, "prompt": "The cat", "max_new_tokens": 3}
            for _ in range(2):
                answer = requests.post(f"{address}/api/huggingface/generate", json=body, timeout=PATIENCE)
                assert answer.status_code == 200, answer.text
                reload = {"force_reload": True}
                load = f"{address}/api/huggingface/models/{model_id}/load"
                assert requests.post(load, json=reload, timeout=PATIENCE).status_code == 200
        finally:
            process.terminate()
            process.wait(60)


def test_a_damaged_registry_is_told_of_at_the_start(start_server: Any, tmp_path: Path) -> None:
    """The server starts on a corrupt file, says under which name it was set aside, and nothing of it is lost."""
    (tmp_path / "models.json").write_text('{"models": [{"model_id": "gp')
    server = start_server()
    [warning] = requests.get(server.url, timeout=PATIENCE).json()["warnings"]
    [aside] = tmp_path.glob("models.json.corrupt-*")
    assert aside.name in warning
    assert str(tmp_path) not in warning
    assert aside.read_text() == '{"models": [{"model_id": "gp'
    assert any(aside.name in line for line in server.lines)
    server.add("gpt2", "text-generation")
    assert server.call("GET", "/models").json()["count"] == 1


def test_a_second_server_on_the_port_says_so(start_server: Any) -> None:
    """A port that is taken is said in one line, without a traceback."""
    server = start_server()
    port = str(urlsplit(server.url).port)
    environment = {**server.environment, "LOCAL_LLM_PORT": port}
    second = subprocess.run(
        [sys.executable, str(ROOT / "app.py")], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert second.returncode == 1
    assert port in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCAL_LLM_PORT", "70000"),
        ("LOCAL_LLM_THREADS", "none"),
        ("LOCAL_LLM_DEVICE", "toaster"),
        ("LOCAL_LLM_BACKEND", "abacus"),
        ("LOCAL_LLM_LOG_LEVEL", "LOUD"),
        ("LOCAL_LLM_HOST", "no-such-host.invalid"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    """A setting that makes no sense stops the start with a message that names it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "app.py")],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert name in done.stderr or value in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_comes_back_after_an_unload(start_server: Any, tiny: Any, starter_models_dir: Path) -> None:
    """After DELETE, resident memory is within 10% of what it was before the load, the first time and the third."""
    server = start_server(LOCAL_LLM_MODELS_DIR=str(starter_models_dir), LOCAL_LLM_IMPORT_AT_START="true")
    process = psutil.Process(server.process.pid)
    assert server.call("GET", "/dependencies").json()["dependencies"]["torch"] is True
    sizes = [0] * 6
    while len(sizes) < 120 and (sizes[-1] < 300e6 or sizes[-1] != sizes[-6]):  # until the import at the start is over
        time.sleep(0.5)
        sizes.append(process.memory_info().rss)
    for path in (f"/cache?model_id={STARTER}", "/cache", f"/models/{STARTER}"):
        before = process.memory_info().rss
        server.add(STARTER, "conversational")
        loaded = server.call("POST", f"/models/{STARTER}/load")
        assert loaded.status_code == 200, loaded.text
        body = {"model_id": STARTER, "prompt": "What is the capital of France?", "max_new_tokens": 8}
        assert server.call("POST", "/generate", json=body).status_code == 200
        assert process.memory_info().rss > before + 400e6
        assert server.call("DELETE", path).status_code == 200
        assert process.memory_info().rss < before * 1.1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_midst_of_a_finalizer_stops_the_server_too(
    how: signal.Signals, start_server: Any, tmp_path: Path
) -> None:
    """Python drops what a handler raises there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "class Last:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), {int(how)})\n"
        "        for _ in range(1000): pass\n"
        "signal.signal(signal.SIGUSR1, lambda *_: bool(Last()))\n"
    )
    server = start_server(PYTHONPATH=str(tmp_path))
    assert server.call("GET", "/models").status_code == 200
    server.process.send_signal(signal.SIGUSR1)
    assert server.process.wait(PATIENCE) == 0
    assert any("SystemExit" in line for line in server.lines)


def test_settings_come_from_the_environment_over_a_file_over_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of `.env` sets what the environment does not; everything else has its default."""
    file = tmp_path / ".env"
    file.write_text("LOCAL_LLM_PORT=5001\nLOCAL_LLM_THREADS=9\nLOCAL_LLM_TRUST_REMOTE_CODE=a/b, c\nOTHER=1\n")
    monkeypatch.setenv("LOCAL_LLM_PORT", "5002")
    settings = Settings(_env_file=file)
    assert (settings.port, settings.threads, settings.host) == (5002, 9, "127.0.0.1")
    assert settings.trust_remote_code == {"a/b", "c"}
    monkeypatch.delenv("LOCAL_LLM_BACKEND", raising=False)
    for name, backend in (("LOCAL_LLM_ENGINE", "openvino"), ("LOCAL_LLM_BACKEND", "torch")):  # the old name goes last
        monkeypatch.setenv(name, backend)
        assert Settings(_env_file=file).backend == backend
    assert Settings.model_config["env_file"] == ROOT / ".env"
