"""Memory: what was estimated beside what torch's allocator and the driver say; budgets, and running out for real.

The server runs in this process, so that its allocator can be asked. On a CPU the process's resident memory stands in.
"""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import psutil

from . import models
from .scale import Scale
from .served import API, generation
from .tell import Tell

_MIB = 1024 * 1024
_SHARE = 0.1  # how far an estimate may be from what is measured
_SLACK = 48 * _MIB  # what libraries take with the first model: cuBLAS's workspaces, small blocks
_LONG = "the quick brown fox jumps over the lazy dog " * 40


class Meter:
    """What this process has on the device: by torch's allocator and by the driver, or as resident memory on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"

    def allocated(self) -> int:
        """Bytes of tensors."""
        if not self.cuda:
            return int(psutil.Process().memory_info().rss)
        import torch

        return int(torch.cuda.memory_allocated())

    def peak(self) -> int:
        """The most bytes of tensors since `begin`."""
        if not self.cuda:
            return self.allocated()
        import torch

        return int(torch.cuda.max_memory_allocated())

    def begin(self) -> None:
        """Forget the peak so far."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def driver(self) -> int:
        """Bytes that are taken on the device, by whatever process, as NVML tells it; resident memory on a CPU."""
        if not self.cuda:
            return self.allocated()
        try:
            import pynvml

            pynvml.nvmlInit()
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
        except Exception:  # noqa: BLE001 - NVML is not there: the driver tells the same by the runtime
            import torch

            free, total = torch.cuda.mem_get_info()
            return int(total - free)


class App:
    """The server in this process, without sockets."""

    def __init__(self, root: Path, device: str, **settings: Any) -> None:
        from app import create_app
        from config import Settings

        self._folder = TemporaryDirectory()
        named = {"registry": Path(self._folder.name) / "models.json", "models_dir": root, "device": device}
        self.app = create_app(Settings(_env_file=None, **{**named, "backend": "torch", **settings}))

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """The status and the JSON answer of one call, from any thread."""
        answer = self.app.test_client().open(path, method=method, json=body)
        return answer.status_code, answer.get_json()

    def done(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON answer of a call that has to succeed."""
        status, answer = self.call(method, path, body)
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {str(answer)[:300]}")
        return answer

    def register(self, *model_ids: str) -> None:
        """Register models that generate."""
        for model_id in model_ids:
            self.done("POST", f"{API}/models", {"model_id": model_id, "name": "x", "model_type": "text-generation"})

    def close(self) -> None:
        """End it."""
        import huggingface

        huggingface.close(self.app)
        self._folder.cleanup()


@contextmanager
def _running(root: Path, scale: Scale, *model_ids: str, **settings: Any) -> Iterator[App]:
    app = App(root, scale.device, **settings)
    try:
        app.register(*model_ids)
        yield app
    finally:
        app.close()


def run(root: Path, scale: Scale, tell: Tell) -> None:
    """All of it, each with a server of its own."""
    meter, large = Meter(scale.device), f"{models.ORG}/large"
    twin = f"{models.ORG}/large-twin"
    if not (root / twin).exists():
        (root / twin).symlink_to(root / large)
    _warm(root, scale)
    with tell.part("estimate"), _running(root, scale, large) as app:
        _estimate(app, large, meter, scale, tell)
    with tell.part("rounds"), _running(root, scale, large) as app:
        _rounds(app, large, meter, scale, tell)
    with tell.part("budget"):
        _budget(root, large, twin, scale, tell)
    with tell.part("out of memory"), _running(root, scale, large, f"{models.ORG}/llama") as app:
        _out_of_memory(app, large, meter, tell)
    for scheme in ("int8", "int4"):
        with tell.part(scheme), _running(root, scale, large) as app:
            _quantized(app, large, scheme, meter, scale, tell)


def _warm(root: Path, scale: Scale) -> None:
    """Have what the first model of a process takes for all: the context, kernels, workspaces."""
    model_id = f"{models.ORG}/llama"
    with _running(root, scale, model_id) as app:
        app.done("POST", f"{API}/generate", generation(model_id, "The cat", max_new_tokens=2))


def _loaded(app: App, model_id: str, **settings: Any) -> dict[str, Any]:
    """Load a model, wait until it is known how it is served, and tell what `/cache` says of it."""
    app.done("POST", f"{API}/models/{model_id}/load", settings)
    app.done("POST", f"{API}/generate", generation(model_id, "The cat", max_new_tokens=1))
    shown: dict[str, Any] = app.done("GET", f"{API}/cache")["cached_models"][model_id]
    return shown


def _settled(meter: Meter) -> int:
    gc.collect()
    sleep(0.3)  # what is given back, is given back soon
    return meter.allocated()


def _estimate(app: App, model_id: str, meter: Meter, scale: Scale, tell: Tell) -> None:
    dtype = scale.half
    told = app.done("GET", f"{API}/models/{model_id}/estimate?dtype={dtype}")
    before, driver_before = _settled(meter), meter.driver()
    meter.begin()
    shown = _loaded(app, model_id, dtype=dtype)
    after, driver_after = _settled(meter) - before, meter.driver() - driver_before
    numbers = {"estimate": told["bytes"], "cache": shown["bytes"], "allocated": after, "driver": driver_after}
    tell.check("the estimate is what a load takes", _near(told["bytes"], after, scale), **numbers)
    tell.check("the driver agrees", _near(told["bytes"], driver_after, scale), **numbers)
    tell.check("the cache tells the same", abs(shown["bytes"] - told["bytes"]) <= _SHARE * told["bytes"], **numbers)
    names = {"estimate": sorted(told["devices"]), "cache": sorted(shown["devices"])}
    tell.check("devices have one name each", names["estimate"] == names["cache"], **names)

    meter.begin()
    bodies = [
        generation(model_id, f"{number} {_LONG}"[:600], max_new_tokens=64, min_new_tokens=64)
        for number in range(scale.many)
    ]
    _together(app, bodies)
    shown = app.done("GET", f"{API}/cache")["cached_models"][model_id]
    peak = meter.peak() - before
    # Activations come and go, and are in no estimate. Resident memory holds more besides.
    numbers = {"callers": len(bodies), "cache_peak": shown["peak_bytes"], "measured_peak": peak}
    apart = peak - shown["peak_bytes"]
    maximum = _SHARE * peak + (_SLACK if meter.cuda else shown["peak_bytes"])
    tell.check("the reported peak is the measured peak", abs(apart) <= maximum, **numbers)

    held = meter.allocated()
    answer = app.done("POST", f"{API}/models/{model_id}/unload", {})
    back = held - _settled(meter)
    numbers = {"told": answer["freed_bytes"], "allocated_back": back, "was": shown["bytes"]}
    tell.check("an unload gives the bytes back", back >= (1 - _SHARE) * shown["bytes"] - _slack(meter), **numbers)
    driver = meter.driver() - driver_before
    tell.check("the driver has them back", driver <= _SHARE * shown["bytes"] + _SLACK, left=driver)


def _near(told: int, found: int, scale: Scale) -> bool:
    slack = _SLACK if scale.device == "cpu" else 2 * _MIB
    return abs(told - found) <= _SHARE * told + slack


def _slack(meter: Meter) -> int:
    return 0 if meter.cuda else _SLACK


def _together(app: App, bodies: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    answers: list[Any] = [None] * len(bodies)

    def ask(place: int) -> None:
        answers[place] = app.call("POST", f"{API}/generate", bodies[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _rounds(app: App, model_id: str, meter: Meter, scale: Scale, tell: Tell) -> None:
    left = []
    for _ in range(scale.load_rounds):
        _loaded(app, model_id, dtype=scale.half)
        app.done("POST", f"{API}/models/{model_id}/unload", {})
        left.append((_settled(meter), meter.driver()))
    grown = [max(at[kind] for at in left[1:]) - left[0][kind] for kind in (0, 1)]
    flat = all(size <= _SLACK for size in grown)
    numbers = {"rounds": len(left), "grown": grown[0], "driver": grown[1]}
    tell.check("rounds of load and unload leave memory as it was", flat, **numbers)


def _budget(root: Path, one: str, other: str, scale: Scale, tell: Tell) -> None:
    with _running(root, scale, one) as app:
        need = app.done("GET", f"{API}/models/{one}/estimate?dtype={scale.half}")["bytes"]
    limit = f"{int(need * 1.5)}B"
    with _running(root, scale, one, other, memory_budget=limit, memory_timeout=0.5) as app:
        for model_id in (one, other, one):
            _loaded(app, model_id, dtype=scale.half)
            present = list(app.done("GET", f"{API}/cache")["cached_models"])
            tell.check("the model that is not used goes for the other", present == [model_id], present=present)
        forecast = app.done("GET", f"{API}/models/{other}/estimate?dtype={scale.half}")
        tell.check("the estimate names what would go", forecast["evicts"] == [one], evicts=forecast["evicts"])
        busy = threading.Thread(
            target=app.call,
            args=("POST", f"{API}/generate", generation(one, "The cat", max_new_tokens=1500, min_new_tokens=1500)),
        )
        busy.start()
        while not app.done("GET", f"{API}/requests")["count"]:
            sleep(0.01)
        status, answer = app.call("POST", f"{API}/models/{other}/load", {"dtype": scale.half})
        refused = status == 503 and one in answer.get("error", "")
        for request in app.done("GET", f"{API}/requests")["requests"]:
            app.call("DELETE", f"{API}/requests/{request['request_id']}")
        busy.join()
        tell.check("a model in use stays, and the refusal names it", refused, status=status, error=answer.get("error"))


def _out_of_memory(app: App, model_id: str, meter: Meter, tell: Tell) -> None:
    """Fill the device, so that little is left, and ask for a pass that needs more than that."""
    other = f"{models.ORG}/llama"
    _loaded(app, model_id)
    asked = generation(other, "The cat", max_new_tokens=16)
    before = app.done("POST", f"{API}/generate", asked)["response"]
    # All the logits of a long prompt at once: some hundred megabytes that nothing could count before.
    hungry = {"model": model_id, "prompt": _LONG[:1500], "max_tokens": 0, "echo": True, "logprobs": 5}
    with _little_left(meter, 32 * _MIB):
        answers = [app.call("POST", "/v1/completions", hungry) for _ in range(3)]
        after = app.call("POST", f"{API}/generate", asked)
    statuses = [status for status, _ in answers]
    said = str(answers[0][1])[:200]
    typed = all(status == 507 for status in statuses)
    tell.check("running out of memory is answered as that", typed, statuses=statuses, said=said)
    alive = after[0] == 200 and after[1]["response"] == before
    tell.check("the other model answers meanwhile", alive, status=after[0])
    again = app.call("POST", "/v1/completions", hungry)
    tell.check("the model answers again afterwards", again[0] == 200, status=again[0])


@contextmanager
def _little_left(meter: Meter, size: int) -> Iterator[None]:
    """Have so many bytes left on the device, or of this process's address space on a CPU."""
    if meter.cuda:
        import torch

        torch.cuda.empty_cache()
        ballast = []
        free, _ = torch.cuda.mem_get_info()
        with suppress(torch.OutOfMemoryError):
            ballast.append(torch.empty(max(0, free - size), dtype=torch.uint8, device="cuda"))
        try:
            yield
        finally:
            ballast.clear()
            torch.cuda.empty_cache()
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _quantized(app: App, model_id: str, scheme: str, meter: Meter, scale: Scale, tell: Tell) -> None:
    from importlib.util import find_spec

    body = {"dtype": scale.half, "quantization": scheme}
    if scheme == "int4" and meter.cuda and find_spec("bitsandbytes") is None:
        status, answer = app.call("POST", f"{API}/models/{model_id}/load", body)
        named = status == 422 and "bitsandbytes" in answer["error"]
        tell.check("int4 without bitsandbytes is refused, with what to install", named, status=status)
        return
    told = app.done("GET", f"{API}/models/{model_id}/estimate?dtype={scale.half}&quantization={scheme}")
    before = _settled(meter)
    shown = _loaded(app, model_id, **body)
    after = _settled(meter) - before
    numbers = {"estimate": told["bytes"], "cache": shown["bytes"], "allocated": after}
    tell.check(f"{scheme}: the estimate is what a load takes", _near(told["bytes"], after, scale), **numbers)
