"""The example program: it takes the whole tour on a live server, and leaves it as it was."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Server
from documented import good


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "example_usage.py"), *arguments], capture_output=True, text=True, timeout=PATIENCE
    )


STEPS = (
    "What is running",
    "Register a model",
    "List and show",
    "Change it",
    "Load it",
    "Generate",
    "What is in memory, and what was used",
    "Tidy up",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own, which the tours leave as it was: empty. It asks no Hub for a model."""
    home = tmp_path_factory.mktemp("home")
    server = Server(tmp_path_factory.mktemp("server"), models_dir, HF_HUB_OFFLINE="1", HF_HOME=str(home))
    yield server
    server.stop()


def test_the_tour_visits_everything_and_removes_the_model_it_registered(
    server: Server, tiny: Callable[[str], str]
) -> None:
    done = run(server.url, "--model", tiny("llama"))
    assert done.returncode == 0, done.stderr
    assert [line[3:] for line in done.stdout.splitlines() if line.startswith("== ")] == list(STEPS)
    assert "Model 'tiny/llama' added successfully" in done.stdout
    assert done.stdout.count("Answer: ") == 2
    assert done.stdout.count("Pipeline: ") == 2
    assert (
        f"Model 'tiny/llama' removed successfully\n\nThat was the tour. Every route, to read and try: {server.url}/docs"
        in done.stdout
    )
    assert good(server.call("GET", "/models"))["models"] == []
    assert good(server.call("GET", "/cache"))["total_cached"] == 0


def test_the_tour_gives_a_registered_model_its_own_fields_back(server: Server, tiny: Callable[[str], str]) -> None:
    server.add(tiny("dialogpt"), "conversational", description="Mine", parameters={"temperature": 0.3})
    before = good(server.call("GET", "/models/tiny/dialogpt"))["model"]
    done = run(server.url, "--model", "tiny/dialogpt")
    assert done.returncode == 0, done.stderr
    after = good(server.call("GET", "/models/tiny/dialogpt"))["model"]
    assert {**after, "usage_count": 0, "last_used": None} == before
    assert after["usage_count"] == 3
    assert good(server.call("GET", "/cache"))["total_cached"] == 0
    good(server.call("DELETE", "/models/tiny/dialogpt"))


def test_the_tour_says_what_went_wrong_and_still_tidies_up(server: Server) -> None:
    done = run(server.url, "--model", "org/nowhere")
    assert done.returncode == 1
    assert "The tour ended early: Model 'org/nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
    assert good(server.call("GET", "/models"))["models"] == []


def test_the_tour_without_a_server_says_how_to_start_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = run(address)  # while nobody else can take the port
    assert done.returncode == 1
    assert done.stderr.strip() == f"No server answers at {address}. Start one with: make run"
