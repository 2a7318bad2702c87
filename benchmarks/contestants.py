"""Who is measured: this server, and its peers. How each is started, asked, and understood.

All of them use the starter model on the CPU, decode greedily, and get the same prompts as raw text. A contestant that
is not installed or does not start is an `Unavailable` with the reason: the table then says so.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import Distribution
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any, ClassVar

from starter import GGUF_FILE, MODEL_ID

from .client import Callers, Request, Stream, follow, get, post
from .converted_starter import FOLDER, MODELS_DIR
from .llama_cpp import SOURCE as LLAMA_CPP_SOURCE
from .program import Program

ROOT = Path(__file__).resolve().parent.parent
_API = "/api/huggingface"
ENVIRONMENTS = ROOT / ".venv-bench"
_START_LIMIT = 300.0  # seconds to start and to load the model


class Unavailable(Exception):
    """A contestant cannot be measured; `str(error)` says why."""


@dataclass(frozen=True)
class Event:
    """What one event of a stream says, in any server's dialect."""

    text: str = ""
    prompt_tokens: int | None = None
    tokens: int | None = None
    finish: str | None = None
    error: str | None = None


@dataclass
class Answer:
    """What one caller got. Times are seconds of `perf_counter`."""

    began: float
    ended: float
    times: list[float] = field(default_factory=list)  # when a piece of text arrived
    text: str = ""
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish: str | None = None
    error: str | None = None

    @property
    def first(self) -> float | None:
        """Seconds to the first text."""
        return self.times[0] - self.began if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one text and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Contestant(ABC):
    """One of those who are compared. `start` it, `ask` it any number of times, `stop` it."""

    key = ""
    label = ""
    weights = "float32"
    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self) -> None:
        self.program: Program | None = None

    @property
    def name(self) -> str:
        """What it is called, with its weights where these are not float32."""
        return self.label if self.weights == "float32" else f"{self.label}, {self.weights}"

    @abstractmethod
    def start(self) -> None:
        """Start it, and return when its model is loaded. Raises Unavailable."""

    @abstractmethod
    def ask(self, prompts: list[str], new_tokens: int, limit: float) -> list[Answer]:
        """Let one caller a prompt begin at once, and wait for all answers, or `limit` seconds."""

    def stop(self) -> None:
        """End its process, if there is one."""
        if self.program is not None:
            self.program.stop()
            self.program = None

    def versions(self) -> dict[str, str]:
        """The versions of what it runs on."""
        return {name: version for name in self.packages if (version := _version(self.python(), name))}

    def python(self) -> Path:
        """The Python that it runs in."""
        return Path(sys.executable)


class Server(Contestant):
    """A contestant behind HTTP."""

    environment: str | None = None  # the folder in .venv-bench, where it has one

    def __init__(self) -> None:
        super().__init__()
        self.port = 0

    @abstractmethod
    def command(self) -> list[str]:
        """The command that serves on `self.port`."""

    def variables(self) -> dict[str, str]:
        """What its environment has besides this process's own."""
        return {}

    @abstractmethod
    def request(self, prompt: str, new_tokens: int) -> Request:
        """A request to continue the prompt, as a stream."""

    @abstractmethod
    def read(self, event: dict[str, Any]) -> Event:
        """What an event of the stream says."""

    def python(self) -> Path:
        if self.environment is None:
            return super().python()
        return ENVIRONMENTS / self.environment / "bin" / "python"

    def installed(self) -> bool:
        """Whether its programs are there."""
        return self.python().is_file() and all(_version(self.python(), name) for name in self.packages)

    def start(self) -> None:
        self.launch()
        try:
            self.load()
        except OSError as error:
            said = self.program.output().strip().splitlines()[-1:] if self.program is not None else []
            self.stop()
            raise Unavailable(f"did not load the model: {error} {' '.join(said)[:200]}") from error

    def launch(self) -> None:
        """Start it, and return when it takes connections. Raises Unavailable."""
        if not self.installed():
            raise Unavailable("not installed: `make bench` tries to, and shows what is missing")
        self.port = _free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCAL_LLM_")}
        # Nothing of this comes from the Hub, and nobody waits for the Hub to say so.
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
        self.program = Program(self.command(), {**inherited, **offline, **self.variables()}, ROOT)
        until = monotonic() + _START_LIMIT
        while not self.listening():
            if self.program.ended() or monotonic() > until:
                said = self.program.output().strip().splitlines()[-1:]
                self.stop()
                raise Unavailable(f"did not start: {' '.join(said)[:200]}")
            sleep(0.2)

    def listening(self) -> bool:
        """Whether it takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def load(self) -> None:
        """Bring the model into memory, where starting does not."""

    def ask(self, prompts: list[str], new_tokens: int, limit: float) -> list[Answer]:
        callers = Callers([self.request(prompt, new_tokens) for prompt in prompts], limit)
        callers.start()
        return [self.understand(stream, new_tokens) for stream in callers.finish()]

    def ask_one(self, request: Request, limit: float) -> Answer:
        """One request by this thread."""
        stream = Stream()
        follow(request, stream, limit)
        return self.understand(stream, None)

    def understand(self, stream: Stream, new_tokens: int | None) -> Answer:
        """The answer that a stream holds."""
        answer = Answer(stream.began, stream.ended, error=stream.error)
        for at, data in stream.events:
            if data == b"[DONE]":
                continue
            event = self.event(data)
            if event.text:
                answer.times.append(at)
                answer.text += event.text
            answer.prompt_tokens = event.prompt_tokens if event.prompt_tokens is not None else answer.prompt_tokens
            answer.tokens = event.tokens if event.tokens is not None else answer.tokens
            answer.finish = event.finish or answer.finish
            answer.error = event.error or answer.error
        if answer.finish is None and answer.error is None:
            answer.error = "the stream broke off"
        if answer.tokens is None:
            # A server that does not count: it made all, or else about one token an event.
            whole = answer.finish == "length" and new_tokens is not None
            answer.tokens = new_tokens if whole else len(answer.times)
        return answer

    def event(self, data: bytes) -> Event:
        """What the data of an event says; data that is no JSON is an error."""
        try:
            return self.read(json.loads(data))
        except ValueError:
            return Event(error=f"not JSON: {data[:100].decode(errors='replace')}")


class LocalLLM(Server):
    """This server with OpenVINO, as it computes by default on a CPU; it is asked for by name all the same."""

    key, label = "ours", "Local LLM, OpenVINO"
    packages: tuple[str, ...] = ("torch", "transformers", "openvino", "waitress")
    settings: ClassVar[dict[str, str]] = {"backend": "openvino"}  # of the load

    def __init__(self, models_dir: Path = MODELS_DIR) -> None:
        super().__init__()
        self.models_dir = models_dir

    def command(self) -> list[str]:
        return [str(self.python()), "app.py"]

    def variables(self) -> dict[str, str]:
        self._folder = tempfile.TemporaryDirectory()
        return {
            "LOCAL_LLM_PORT": str(self.port),
            "LOCAL_LLM_REGISTRY": str(Path(self._folder.name) / "models.json"),
            "LOCAL_LLM_MODELS_DIR": str(self.models_dir),
            "LOCAL_LLM_DEVICE": "cpu",
            "LOCAL_LLM_LOG_LEVEL": "WARNING",
        }

    def launch(self) -> None:
        super().launch()
        get(self.port, f"{_API}/dependencies", _START_LIMIT)  # it imports torch meanwhile
        model = {"model_id": MODEL_ID, "name": "Benchmark", "model_type": "text-generation"}
        post(Request(self.port, f"{_API}/models", model), 60)

    def load(self) -> None:
        post(Request(self.port, f"{_API}/models/{MODEL_ID}/load", self.settings), _START_LIMIT)

    def log_probabilities(self, prompt: list[int], limit: float) -> list[float]:
        """Of each token of a prompt but the first, as the server tells them."""
        body = {"model": MODEL_ID, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = post(Request(self.port, "/v1/completions", body), limit)
        found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        if len(found) != len(prompt) - 1:
            raise Unavailable(f"told {len(found)} log-probabilities of {len(prompt) - 1}")
        return found

    def request(self, prompt: str, new_tokens: int) -> Request:
        return self.generate({"prompt": prompt}, new_tokens)

    def chat(self, messages: list[dict[str, str]], new_tokens: int) -> Request:
        """A request for the next turn of a chat."""
        return self.generate({"messages": messages}, new_tokens)

    def generate(self, source: dict[str, Any], new_tokens: int) -> Request:
        """A request to `/generate`, greedy and without a penalty."""
        greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": new_tokens, "stream": True}
        return Request(self.port, f"{_API}/generate", {"model_id": MODEL_ID, **source, **greedy})

    def read(self, event: dict[str, Any]) -> Event:
        if "success" not in event:
            return Event(text=event.get("text") or "")
        if not event["success"]:
            return Event(error=str(event.get("error")))
        usage = event.get("usage") or {}
        return Event(
            prompt_tokens=usage.get("prompt_tokens"),
            tokens=usage.get("completion_tokens"),
            finish=event.get("finish_reason") or "unknown",
        )

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_folder"):
            self._folder.cleanup()


class LocalLLMTorch(LocalLLM):
    """This server with torch."""

    key, label = "ours-torch", "Local LLM, torch"
    packages = ("torch", "transformers", "waitress")
    settings: ClassVar[dict[str, str]] = {"backend": "torch"}


class LocalLLMInt8(LocalLLM):
    """This server with OpenVINO and weights of 8 bits."""

    key, weights = "ours-int8", "int8"
    settings: ClassVar[dict[str, str]] = {"backend": "openvino", "quantization": "int8"}


class LocalLLMInt4(LocalLLMInt8):
    """This server with OpenVINO and weights of 4 bits."""

    key, weights = "ours-int4", "int4"
    settings: ClassVar[dict[str, str]] = {"backend": "openvino", "quantization": "int4"}


class _Completions(Server):
    """A server with OpenAI's `/v1/completions`."""

    greedy: ClassVar[dict[str, Any]] = {"temperature": 0}

    def request(self, prompt: str, new_tokens: int) -> Request:
        body = {"model": self.model(), "prompt": prompt, "max_tokens": new_tokens, "stream": True, **self.greedy}
        return Request(self.port, "/v1/completions", body)

    @abstractmethod
    def model(self) -> str:
        """The model's name in a request."""

    def read(self, event: dict[str, Any]) -> Event:
        if "error" in event:
            return Event(error=str(event["error"]))
        usage = event.get("usage") or {}
        choices = event.get("choices") or [{}]
        return Event(
            text=choices[0].get("text") or "",
            prompt_tokens=usage.get("prompt_tokens"),
            tokens=usage.get("completion_tokens"),
            finish=choices[0].get("finish_reason"),
        )


class TransformersServe(_Completions):
    """`transformers serve`: one request after the other."""

    key, label = "serve", "transformers serve"
    environment = "serve"
    packages = ("torch", "transformers", "uvicorn", "fastapi")
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        # As a module: the script `transformers` does not run from a path with spaces.
        program = [str(self.python()), "-m", "transformers.cli.transformers", "serve", self.model()]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        return [*program, *where, *self.options]

    def model(self) -> str:
        return str(FOLDER)


class TransformersServeBatching(TransformersServe):
    """`transformers serve --continuous-batching`."""

    key, label = "serve-cb", "transformers serve --continuous-batching"
    options = ("--continuous-batching",)


class LlamaCpp(_Completions):
    """llama.cpp's server, built for this processor, on the same weights rounded to 8 bits by its own program."""

    key, label = "llama-cpp", "llama.cpp's server"
    weights = "Q8_0"
    packages = ()
    environment = "llama-cpp"
    slots, context = 16, 2560  # callers at once, and tokens of each

    def installed(self) -> bool:
        return self._program("llama-server").is_file()

    def versions(self) -> dict[str, str]:
        return {"llama.cpp": f"in {LLAMA_CPP_SOURCE}"}

    def command(self) -> list[str]:
        options = {
            "--model": self.model(),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--threads": str(os.cpu_count() or 1),
            "--parallel": str(self.slots),
            "--ctx-size": str(self.slots * self.context),
            "--cache-ram": "0",  # no prompt comes twice: do not spend time on keeping them
        }
        given = [part for pair in options.items() for part in pair]
        return [str(self._program("llama-server")), *given, "--no-kv-unified"]

    def listening(self) -> bool:
        """Whether it has loaded its model: it takes connections before."""
        try:
            get(self.port, "/health", 5)
        except OSError:
            return False
        return True

    def model(self) -> str:
        made = self._program("llama-server").parents[1] / f"{FOLDER.name}.{self.weights}.gguf"
        source = FOLDER / GGUF_FILE
        if not made.is_file() or made.stat().st_mtime < source.stat().st_mtime:
            unfinished = made.with_suffix(".tmp")
            # Of the file's 4-bit weights float32 is made first, as in the converted starter; that is rounded.
            program = [str(self._program("llama-quantize")), "--allow-requantize", str(source), str(unfinished)]
            done = subprocess.run([*program, self.weights], capture_output=True)
            if done.returncode:
                raise Unavailable(f"llama-quantize failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
            unfinished.replace(made)
        return str(made)

    def _program(self, name: str) -> Path:
        return ENVIRONMENTS / "llama-cpp" / "bin" / name


class LlamaCpp4Bit(LlamaCpp):
    """The same on the starter's own file."""

    key, weights = "llama-cpp-q4", "Q4_1"

    def model(self) -> str:
        return str(FOLDER / GGUF_FILE)


class Generate(Contestant):
    """`model.generate` on a static batch, without HTTP."""

    key, label = "generate", "model.generate, static batch, no HTTP"

    def start(self) -> None:
        command = [str(self.python()), "-m", "benchmarks.generate", str(FOLDER)]
        self.program = Program(command, {**os.environ, "HF_HUB_OFFLINE": "1"}, ROOT, pipes=True)
        try:
            self._hear(_START_LIMIT)
        except (OSError, ValueError) as error:
            said = self.program.output().strip().splitlines()[-1:]
            self.stop()
            raise Unavailable(f"did not start: {' '.join(said)[:200]}") from error

    def ask(self, prompts: list[str], new_tokens: int, limit: float) -> list[Answer]:
        if self.program is None or self.program.stdin is None:
            raise Unavailable("not started")
        began = perf_counter()
        self.program.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n")
        self.program.stdin.flush()
        try:
            heard = self._hear(limit)
        except (OSError, ValueError) as error:
            return [Answer(began, perf_counter(), error=f"not finished after {limit:.0f} s: {error}") for _ in prompts]
        rows = zip(heard["tokens"], heard["texts"], heard["prompt_tokens"], strict=True)
        return [
            Answer(
                began,
                began + heard["seconds"],
                [began + at for at in heard["times"][:tokens]],
                text,
                tokens,
                prompt_tokens,
                "length" if tokens == new_tokens else "stop",
            )
            for tokens, text, prompt_tokens in rows
        ]

    def _hear(self, limit: float) -> dict[str, Any]:
        """The child's next line. Raises TimeoutError, or ValueError if the child has ended."""
        if self.program is None or self.program.stdout is None:
            raise Unavailable("not started")
        ready, _, _ = select.select([self.program.stdout], [], [], limit)
        if not ready:
            raise TimeoutError("no answer")
        return dict(json.loads(self.program.stdout.readline()))


CONTESTANTS: dict[str, type[Contestant]] = {
    kind.key: kind
    for kind in (
        LocalLLM,
        LocalLLMTorch,
        LocalLLMInt8,
        LocalLLMInt4,
        Generate,
        TransformersServe,
        TransformersServeBatching,
        LlamaCpp,
        LlamaCpp4Bit,
    )
}
# Who is measured where nobody says otherwise.
USUAL = ("ours", "ours-torch", "ours-int8", "generate", "serve-cb", "llama-cpp")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _version(python: Path, package: str) -> str | None:
    """The version of a package in the environment of that Python, read from its files."""
    folders = [str(path) for path in python.parent.parent.glob("lib/python*/site-packages")]
    wanted = re.sub(r"[-_.]+", "_", package)
    found = next(iter(Distribution.discover(name=wanted, path=folders)), None)
    return found.version if found else None
