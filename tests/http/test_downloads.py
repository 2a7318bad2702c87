"""Downloads: one job for all who want a model, that goes on where it stopped, whatever stopped it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, Server, until
from hub import Repository
from hub_place import Place, refused, works

from huggingface import hub
from huggingface.cancellation import Cancellation
from huggingface.errors import (
    Cancelled,
    DiskFull,
    FilesCorrupt,
    FilesGated,
    FilesMissing,
    FilesRefused,
    HubUnreachable,
    LoadError,
)
from huggingface.hub.disk import Disk
from huggingface.hub.downloads import Downloads
from huggingface.hub.job import Job
from huggingface.progress import Progress
from huggingface.registry.records import ModelRecord
from huggingface.types import LoadOptions

WEIGHTS = "model.safetensors"
MB = 1024**2


@pytest.fixture
def place(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A Hub that `huggingface_hub` in this process knows alone, with an empty cache."""
    from huggingface_hub import close_session, constants

    place = Place(tmp_path, models_dir)
    close_session()
    with place.hub:
        for name, value in place.hub.environment(place.home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in {
            "ENDPOINT": place.hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{place.hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(place.home / "hub"),
            "HF_TOKEN_PATH": str(place.home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_ETAG_TIMEOUT": 2,
            "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield place
    for server in place.servers:
        server.stop(signal.SIGKILL)
    close_session()


@pytest.fixture
def downloads(place: Place) -> Iterator[Downloads]:
    """The downloads of a server that runs no server."""
    downloads = Downloads(LoadOptions(models_dir=place.local))
    yield downloads
    downloads.close()


def publish(place: Place, model_id: str, size: int = 3 * MB, *, seed: int = 0) -> Repository:
    """A repository whose weights are of about `size` bytes, and no model's."""
    fill(place.hub.root / model_id, size, seed)
    return place.hub.repository(model_id)


def fill(folder: Path, size: int = 3 * MB, seed: int = 0) -> None:
    """Put the files of a model into a folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "seed": seed}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"noise": np.random.default_rng(seed).integers(0, 256, size, np.uint8)}, folder / WEIGHTS)


def record(model_id: str, **fields: Any) -> ModelRecord:
    """A registered model."""
    return ModelRecord(model_id, model_id, "text-generation", **fields)


def arriving(place: Place, model_id: str, count: int = MB // 2) -> None:
    """Wait until so many bytes of the weights were sent."""
    until(lambda: sum(body.count for body in place.hub.bodies_of(model_id, WEIGHTS)) >= count)


def done(job: Job) -> Path:
    """Wait for the end of a job, and have what it brought."""
    assert job.wait(60)
    return job.result()


def same(repository: Repository, folder: Path) -> bool:
    """Whether the weights in the folder are those of the repository."""
    return (folder / WEIGHTS).read_bytes() == (repository.folder / WEIGHTS).read_bytes()


def partials(place: Place, model_id: str) -> list[Path]:
    """The files of the cache that are not whole."""
    return list((place.cached(model_id) / "blobs").glob("*.part"))


def test_many_callers_share_one_download_and_each_file_is_sent_once(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/shared")
    repository.rate[WEIGHTS] = 4 * MB
    progresses = [Progress() for _ in range(8)]
    with ThreadPoolExecutor(9) as threads:
        asked = threads.submit(downloads.start, record("org/shared"))
        folders = list(threads.map(lambda progress: downloads.folder(record("org/shared"), progress), progresses))
    assert set(folders) == {done(asked.result())}
    assert same(repository, folders[0])
    assert sorted(place.hub.downloads("org/shared")) == ["config.json", WEIGHTS, "tokenizer.json"]
    size = sum(path.stat().st_size for path in repository.files().values())
    for progress in progresses:
        moment = progress.now()
        assert (moment.phase, moment.done, moment.total) == ("download", size, size)


def test_progress_counts_the_bytes_of_all_needed_files_and_those_that_were_here(
    place: Place, downloads: Downloads
) -> None:
    repository = publish(place, "org/told")
    (repository.folder / "README.md").write_text("x" * 1000)  # not needed
    (repository.folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    repository.rate[WEIGHTS] = 4 * MB
    needed = {name: (repository.folder / name).stat().st_size for name in ("config.json", "tokenizer.json", WEIGHTS)}
    job = downloads.start(record("org/told"))
    moments, version = [], -1
    while not job.over:
        version, moment = job.progress.wait(version, 1)
        moments.append(moment)
    middle = [moment for moment in moments if moment.total and 0 < moment.done < moment.total]
    assert {moment.total for moment in middle} == {sum(needed.values())}
    assert [moment.done for moment in middle] == sorted(moment.done for moment in middle)
    assert any(moment.file == WEIGHTS and moment.speed > MB and moment.seconds_left for moment in middle)
    assert len(middle) >= 5
    assert job.progress.now().done == sum(needed.values())
    assert (job.progress.now().phase, job.commit) == ("ready", repository.commit)
    (repository.folder / "tokenizer.json").write_text('{"a": "new one"}')
    again = downloads.start(record("org/told"))
    done(again)
    assert again.commit == repository.commit != job.commit
    assert place.hub.downloads("org/told").count(WEIGHTS) == 1  # the same content under a new commit
    with place.hub.recording() as made:
        third = downloads.start(record("org/told"))
        done(third)
    assert len(made) == 1
    assert (third.progress.now().done, third.active) == (third.progress.now().total, False)


def test_a_cancelled_download_stops_at_once_and_the_next_one_goes_on_from_there(
    place: Place, downloads: Downloads
) -> None:
    repository = publish(place, "org/stopped")
    repository.rate[WEIGHTS] = 2 * MB
    job = downloads.start(record("org/stopped"))
    arriving(place, "org/stopped")
    assert downloads.cancel("org/stopped")
    assert job.over
    assert job.progress.now().phase == "cancelled"
    with pytest.raises(Cancelled):
        job.result()
    assert not downloads.cancel("org/stopped")
    until(lambda: not (job.thread and job.thread.is_alive()))
    here = partials(place, "org/stopped")[0].stat().st_size
    assert here >= MB // 2
    assert downloads.left_behind("org/stopped") == here
    repository.rate.clear()
    again = downloads.start(record("org/stopped"))
    assert same(repository, done(again))
    starts = [body.start for body in place.hub.bodies_of("org/stopped", WEIGHTS)]
    assert starts == [0, here]
    assert downloads.get("org/stopped") is again
    assert downloads.left_behind("org/stopped") is None


def test_a_download_that_hangs_is_cancelled_at_once_and_a_new_one_waits_for_it(
    place: Place, downloads: Downloads
) -> None:
    repository = publish(place, "org/hung")
    repository.stall = frozenset({WEIGHTS})
    job = downloads.start(record("org/hung"))
    until(lambda: place.hub.bodies_of("org/hung", WEIGHTS))
    downloads.cancel("org/hung")
    assert job.over
    repository.stall = frozenset()
    assert same(repository, done(downloads.start(record("org/hung"))))


AGENT = """
import sys
from pathlib import Path
from huggingface.hub.downloads import Downloads
from huggingface.registry.records import ModelRecord
from huggingface.types import LoadOptions
downloads = Downloads(LoadOptions(models_dir=Path(sys.argv[1])))
job = downloads.start(ModelRecord(sys.argv[2], "x", "text-generation"))
assert job.wait(60)
print(job.result())
"""


def agent(place: Place, model_id: str) -> subprocess.Popen[str]:
    """Another process that downloads a model into the same cache."""
    environment = {**place.hub.environment(place.home), "PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", AGENT, str(place.local), model_id]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_had_of_a_file_is_not_fetched_again(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/killed")
    repository.rate[WEIGHTS] = 2 * MB
    process = agent(place, "org/killed")
    arriving(place, "org/killed", MB)
    process.kill()
    process.communicate()
    repository.rate.clear()
    with pytest.raises(FilesMissing, match="download it first"):
        downloads.present(record("org/killed"))
    assert same(repository, done(downloads.start(record("org/killed"))))
    first, second = place.hub.bodies_of("org/killed", WEIGHTS)
    size = (repository.folder / WEIGHTS).stat().st_size
    assert MB // 2 < second.start <= first.count
    assert second.start + second.count == size
    assert place.hub.downloads("org/killed").count("tokenizer.json") == 1
    assert partials(place, "org/killed") == []


def test_two_processes_that_want_the_same_files_fetch_them_once(place: Place) -> None:
    repository = publish(place, "org/both")
    repository.rate[WEIGHTS] = 2 * MB
    processes = [agent(place, "org/both") for _ in range(2)]
    folders = {process.communicate(timeout=PATIENCE)[0] for process in processes}
    assert len(folders) == 1
    assert same(repository, Path(folders.pop().strip()))
    assert len(place.hub.bodies_of("org/both", WEIGHTS)) == 1


def test_a_hub_that_takes_no_notice_of_ranges_sends_the_file_anew(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/whole")
    repository.cut[WEIGHTS] = MB
    repository.status[WEIGHTS] = [200, 500, 500]
    with pytest.raises(HubUnreachable):
        done(downloads.start(record("org/whole")))
    assert len(partials(place, "org/whole")) == 1
    repository.cut.clear()
    repository.whole = frozenset({WEIGHTS})
    job = downloads.start(record("org/whole"))
    assert same(repository, done(job))
    assert [body.start for body in place.hub.bodies_of("org/whole", WEIGHTS)] == [0, 0]
    assert job.progress.now().done == job.progress.now().total


def test_a_connection_that_breaks_and_a_hub_that_stumbles_cost_no_byte_twice(
    place: Place, downloads: Downloads
) -> None:
    repository = publish(place, "org/rough", 7 * MB // 2)
    repository.cut[WEIGHTS] = MB + 5
    repository.status[WEIGHTS] = [200, 503, 200, 429]
    job = downloads.start(record("org/rough"))
    assert same(repository, done(job))
    bodies = place.hub.bodies_of("org/rough", WEIGHTS)
    assert [body.start for body in bodies] == [0, MB + 5, 2 * MB + 10, 3 * MB + 15]
    assert job.progress.now().done == job.progress.now().total


def test_a_hub_that_sends_nothing_more_is_given_up_after_some_attempts(place: Place, downloads: Downloads) -> None:
    publish(place, "org/quiet").stall = frozenset({WEIGHTS})
    job = downloads.start(record("org/quiet"))
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        done(job)
    assert len(place.hub.bodies_of("org/quiet", WEIGHTS)) == 3
    assert job.progress.now().phase == "failed"


def test_a_hub_that_goes_on_after_a_silence_costs_a_moment(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/pausing")
    repository.stall = frozenset({WEIGHTS})
    job = downloads.start(record("org/pausing"))
    until(lambda: place.hub.bodies_of("org/pausing", WEIGHTS))
    repository.stall = frozenset()
    assert same(repository, done(job))


def test_a_file_with_another_checksum_is_refused_and_thrown_away(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/wrong")
    content = (repository.folder / WEIGHTS).read_bytes()
    repository.replace[WEIGHTS] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(FilesCorrupt, match=r"model\.safetensors was damaged.*checksum"):
        done(downloads.start(record("org/wrong")))
    assert partials(place, "org/wrong") == []
    assert len(place.hub.bodies_of("org/wrong", WEIGHTS)) == 1  # a second time would be no better
    repository.replace.clear()
    assert same(repository, done(downloads.start(record("org/wrong"))))


def test_an_earlier_part_that_is_damaged_is_fetched_anew(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/rotten")
    repository.status[WEIGHTS] = [500] * 3
    with pytest.raises(HubUnreachable):
        done(downloads.start(record("org/rotten")))
    partials(place, "org/rotten")[0].write_bytes(b"?" * MB)
    assert same(repository, done(downloads.start(record("org/rotten"))))
    assert [body.start for body in place.hub.bodies_of("org/rotten", WEIGHTS)] == [MB, 0]


def test_a_part_that_is_longer_than_the_file_is_fetched_anew(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/long")
    repository.status[WEIGHTS] = [500] * 3
    with pytest.raises(HubUnreachable):
        done(downloads.start(record("org/long")))
    partials(place, "org/long")[0].write_bytes(b"?" * 5 * MB)
    assert same(repository, done(downloads.start(record("org/long"))))


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_begun(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/huge")
    repository.sizes[WEIGHTS] = 10**15
    with pytest.raises(DiskFull, match=r"1000000\.\d GB are still to be downloaded.* [\d.]+ [GM]B free"):
        done(downloads.start(record("org/huge")))
    assert place.hub.bodies_of("org/huge", WEIGHTS) == []
    assert place.hub.downloads("org/huge") == ["config.json"]


def limited(place: Place, free: int) -> Downloads:
    """Downloads on a disk with so much room, which becomes less as the Hub's cache grows."""

    def left(_: Path) -> int:
        files = (path for path in place.home.rglob("*") if path.is_file() and not path.is_symlink())
        return free - sum(path.stat().st_size for path in files)

    return Downloads(LoadOptions(models_dir=place.local), disk=Disk(left))


def test_downloads_that_run_have_the_room_on_the_disk_that_they_still_need(place: Place) -> None:
    """Each of two would fit; the second is told what the first still needs, and fits when that one was given up."""
    first, second = publish(place, "org/first"), publish(place, "org/second", seed=1)
    first.rate[WEIGHTS] = MB
    downloads = limited(place, 5 * MB)
    try:
        running = downloads.start(record("org/first"))
        arriving(place, "org/first")
        with pytest.raises(
            DiskFull, match=r"3\.\d MB are still to be .* 4\.\d MB free, 2\.\d MB of them for other downloads"
        ):
            done(downloads.start(record("org/second")))
        assert place.hub.bodies_of("org/second", WEIGHTS) == []
        assert same(first, done(running))
        for blob in (place.cached("org/first") / "blobs").iterdir():
            blob.write_bytes(b"")  # somebody makes room
        assert same(second, done(downloads.start(record("org/second"))))
    finally:
        downloads.close()


def test_a_download_that_ends_early_leaves_its_room_to_others(place: Place) -> None:
    first, second = publish(place, "org/first"), publish(place, "org/second", seed=1)
    first.rate[WEIGHTS] = MB // 4
    downloads = limited(place, 5 * MB)
    try:
        downloads.start(record("org/first"))
        arriving(place, "org/first", MB // 4)
        downloads.cancel("org/first")
        until(lambda: not any(thread.name == "download-org/first" for thread in threading.enumerate()))
        assert same(second, done(downloads.start(record("org/second"))))
    finally:
        downloads.close()


def test_a_model_and_its_adapters_have_to_fit_on_the_disk_together(place: Place) -> None:
    publish(place, "org/base")
    adapter = publish(place, "org/adapter", 2 * MB).folder
    (adapter / WEIGHTS).rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    downloads = limited(place, 4 * MB)
    wanted = record("org/base", adapters={"a": "org/adapter"})
    try:
        with pytest.raises(
            DiskFull, match=r"'org/base': 3\.\d MB are still .* 4\.\d MB free, 2\.\d MB of them for other downloads"
        ):
            done(downloads.start(wanted))
        assert place.hub.bodies_of("org/base", WEIGHTS) == []
    finally:
        downloads.close()
    roomy = limited(place, 6 * MB)
    try:
        done(roomy.start(wanted))
        assert (place.snapshot("org/adapter") / "adapter_model.safetensors").stat().st_size > 2 * MB
    finally:
        roomy.close()


@pytest.mark.parametrize("api", [True, False])
def test_a_branch_a_tag_and_a_commit_are_each_what_they_stand_for(
    place: Place, downloads: Downloads, api: bool
) -> None:
    repository = publish(place, "org/versions", MB)
    repository.api = api
    for seed, name in enumerate(("v1.0", "feature/wide"), 1):
        repository.revisions[name] = place.directory / f"revision-{seed}"
        fill(repository.revisions[name], MB, seed)
    commit = repository.commit_of(repository.revisions["v1.0"])
    seeds = {None: 0, "v1.0": 1, "feature/wide": 2, commit: 1}
    for revision, seed in seeds.items():
        job = downloads.start(record("org/versions", revision=revision))
        folder = done(job)
        assert json.loads((folder / "config.json").read_text())["seed"] == seed
        assert job.commit == folder.name
    assert len(place.hub.bodies_of("org/versions", WEIGHTS)) == 3
    references = place.cached("org/versions") / "refs"
    assert {path.relative_to(references).as_posix() for path in references.rglob("*") if path.is_file()} == {
        "main",
        "v1.0",
        "feature/wide",
    }
    place.hub.down = 502
    for revision, seed in seeds.items():
        folder = downloads.folder(record("org/versions", revision=revision), Progress())
        assert json.loads((folder / "config.json").read_text())["seed"] == seed


@pytest.mark.parametrize("revision", ["nowhere", "../../secret", "/etc", "a..b", "a b", "0" * 40])
def test_an_unknown_revision_is_told_by_its_name(place: Place, downloads: Downloads, revision: str) -> None:
    publish(place, "org/one", MB)
    with pytest.raises(FilesMissing, match="has no branch, tag or commit"):
        done(downloads.start(record("org/one", revision=revision)))


def test_the_offline_switch_sends_no_packet(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/here", MB)
    publish(place, "org/away", MB)
    done(downloads.start(record("org/here")))
    offline = Downloads(LoadOptions(models_dir=place.local, offline=True))
    with place.hub.recording() as made:
        job = offline.start(record("org/here"))
        assert same(repository, done(job))
        assert job.progress.now().done == job.progress.now().total
        assert job.commit == repository.commit
        with pytest.raises(HubUnreachable, match="LOCAL_LLM_OFFLINE"):
            done(offline.start(record("org/away")))
        with pytest.raises(HubUnreachable, match="switched off"):
            hub.fetch_adapter("org/away", offline=True)
    assert made == []


def test_a_part_of_a_file_is_never_taken_for_the_file(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/part")
    repository.cut[WEIGHTS] = MB
    repository.status[WEIGHTS] = [200, 500, 500]
    with pytest.raises(HubUnreachable):
        done(downloads.start(record("org/part")))
    assert len(partials(place, "org/part")) == 1
    assert not (place.snapshot("org/part") / WEIGHTS).exists()
    place.hub.down = 503
    with pytest.raises(HubUnreachable):
        downloads.folder(record("org/part"), Progress())
    with pytest.raises(FilesMissing, match="download it first"):
        downloads.present(record("org/part"))
    offline = Downloads(LoadOptions(models_dir=place.local, offline=True))
    with pytest.raises(HubUnreachable):
        offline.folder(record("org/part"), Progress())


def test_what_may_not_be_read_and_what_is_not_there_fail_by_their_names(
    place: Place, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(place, "org/gated", MB).gated = True
    publish(place, "org/private", MB).private = True
    expected: dict[str, type[LoadError]] = {
        "org/gated": FilesGated,
        "org/private": FilesMissing,
        "org/nothing": FilesMissing,
    }
    for model_id, kind in expected.items():
        job = downloads.start(record(model_id))
        with pytest.raises(kind, match=model_id):
            done(job)
        assert job.progress.now().phase == "failed"
        assert model_id in str(job.progress.now().error)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    for model_id in ("org/gated", "org/private"):
        with pytest.raises(expected[model_id]):
            done(downloads.start(record(model_id)))
        place.hub.repository(model_id).tokens = frozenset({"hf_token"})
        done(downloads.start(record(model_id)))
    assert {request.token for request in place.hub.requests if request.path.startswith("/cdn/")} == {None}


def test_a_gguf_file_is_the_weights_and_needs_no_config(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/quantized")
    for path in repository.files().values():
        path.unlink()
    (repository.folder / "sub").mkdir()
    for name in ("model-Q4.gguf", "model-Q8.gguf", "sub/model-Q2.gguf"):
        (repository.folder / name).write_bytes(name.encode() * 1000)
    for name in ("model-Q4.gguf", "sub/model-Q2.gguf"):
        folder = done(downloads.start(record("org/quantized", gguf_file=name)))
        assert (folder / name).read_bytes() == name.encode() * 1000
        assert folder.name == repository.commit
    assert downloads.present(record("org/quantized", gguf_file="model-Q4.gguf")) == folder
    (repository.folder / "tokenizer.json").write_text("{}")
    folder = done(downloads.start(record("org/quantized", gguf_file="model-Q4.gguf")))
    assert (folder / "tokenizer.json").is_file()
    assert "model-Q8.gguf" not in place.hub.downloads("org/quantized")
    with pytest.raises(FilesMissing, match=r"lacks model-Q3\.gguf"):
        done(downloads.start(record("org/quantized", gguf_file="model-Q3.gguf")))
    for name in ("../model.gguf", "/etc/x.gguf", "config.json"):
        with pytest.raises(FilesRefused):
            done(downloads.start(record("org/quantized", gguf_file=name)))


@pytest.mark.parametrize("listed", [True, False])
def test_all_parts_of_a_gguf_file_are_fetched(listed: bool, place: Place, downloads: Downloads) -> None:
    """Whichever part the record names; one that the repository lacks is named, and nothing is fetched then."""
    repository = publish(place, "org/parts")
    for path in repository.files().values():
        path.unlink()
    repository.api = repository.codes = listed
    (repository.folder / "README.md").write_text("A model.")
    (repository.folder / "Q8").mkdir()
    names = [f"Q8/model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names[:2]:
        (repository.folder / name).write_bytes(name.encode() * 1000)
    for name in names[:2]:
        with pytest.raises(FilesMissing, match=f"lacks {names[2]}"):
            done(downloads.start(record("org/parts", gguf_file=name)))
    assert place.hub.downloads("org/parts") == []
    (repository.folder / names[2]).write_bytes(names[2].encode() * 1000)
    (repository.folder / "Q8/other-00001-of-00002.gguf").write_bytes(b"other")
    folder = done(downloads.start(record("org/parts", gguf_file=names[1])))
    for name in names:
        assert (folder / name).read_bytes() == name.encode() * 1000
        assert downloads.present(record("org/parts", gguf_file=name)) == folder
    sent = {name for name in place.hub.downloads("org/parts") if name.endswith(".gguf")}
    assert sent == {name.removeprefix("Q8/") for name in names}
    (folder / names[0]).unlink()
    with pytest.raises(FilesMissing, match="not \\(completely\\) on this machine"):
        downloads.present(record("org/parts", gguf_file=names[2]))


def test_of_an_adapter_that_is_not_here_only_the_head_is_fetched_to_estimate_it(
    place: Place, downloads: Downloads
) -> None:
    adapter = place.hub.root / "org/adapter"
    fill(adapter, MB)
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.safetensors")
    with place.hub.recording() as made:
        [head] = downloads.adapter_heads(record("org/base", adapters={"one": "org/adapter"}))
    assert head["noise"].bytes == MB
    assert sum(body.count for body in place.hub.bodies_of("org/adapter", "adapter_model.safetensors")) < MB // 2
    assert made
    hub.fetch_adapter("org/adapter")
    with place.hub.recording() as made:
        assert downloads.adapter_heads(record("org/base", adapters={"one": "org/adapter"})) == [head]
    assert made == []
    with pytest.raises(LoadError, match="org/none"):
        downloads.adapter_heads(record("org/base", adapters={"one": "org/none"}))


def test_the_adapters_of_a_model_are_brought_with_it_and_never_as_pickles(place: Place, downloads: Downloads) -> None:
    publish(place, "org/base", MB)
    adapter = place.hub.root / "org/adapter"
    fill(adapter, MB)
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.safetensors")
    done(downloads.start(record("org/base", adapters={"one": "org/adapter"})))
    assert sorted(place.hub.downloads("org/adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    with place.hub.recording() as made:
        folders = downloads.adapters(record("org/base", adapters={"one": "org/adapter"}))
    assert (folders["one"] / "adapter_model.safetensors").is_file()
    assert len(made) == 1
    fill(place.local / "org/base", MB)  # a base of the models folder, and an adapter of the Hub's
    done(downloads.start(record("org/base", adapters={"one": "org/adapter"})))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FilesRefused, match="pickle"):
        hub.fetch_adapter("org/adapter")
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(FilesMissing, match=r"lacks adapter_model\.safetensors"):
        hub.fetch_adapter("org/adapter")


def test_a_download_ends_when_nobody_wants_it_any_more(place: Place, downloads: Downloads) -> None:
    publish(place, "org/left").rate[WEIGHTS] = MB
    gone = Cancellation()
    with ThreadPoolExecutor(3) as threads:
        waits = [
            threads.submit(downloads.folder, record("org/left"), Progress(), gone),
            threads.submit(downloads.folder, record("org/left"), Progress()),
        ]
        arriving(place, "org/left", MB // 4)
        gone.cancel()
        with pytest.raises(Cancelled):
            waits[0].result(PATIENCE)
        job = downloads.get("org/left")
        assert job is not None
        assert not job.over  # the other one still waits
        assert waits[1].result(PATIENCE) == job.result()


def test_a_download_of_loads_alone_is_given_up_with_the_last_and_one_that_was_asked_for_goes_on(
    place: Place, downloads: Downloads
) -> None:
    for model_id, asked in (("org/mere-load", False), ("org/asked", True)):
        publish(place, model_id).rate[WEIGHTS] = 2 * MB
        gone = Cancellation()
        with ThreadPoolExecutor(1) as threads:
            wait = threads.submit(downloads.folder, record(model_id), Progress(), gone)
            arriving(place, model_id)
            if asked:
                downloads.start(record(model_id))
            gone.cancel()
            with pytest.raises(Cancelled):
                wait.result(PATIENCE)
        job = downloads.get(model_id)
        assert job is not None
        assert job.over is not asked
        if asked:
            done(job)


def test_a_load_that_is_cancelled_by_its_progress_waits_no_more(place: Place, downloads: Downloads) -> None:
    publish(place, "org/unwanted").rate[WEIGHTS] = MB
    progress = Progress()
    with ThreadPoolExecutor(1) as threads:
        wait = threads.submit(downloads.folder, record("org/unwanted"), progress)
        arriving(place, "org/unwanted", MB // 4)
        progress.cancel()
        with pytest.raises(Cancelled):
            wait.result(PATIENCE)


def test_the_end_of_the_server_ends_downloads_and_keeps_what_came(place: Place) -> None:
    repository = publish(place, "org/ended")
    repository.rate[WEIGHTS] = MB
    publish(place, "org/stuck").stall = frozenset({WEIGHTS})
    downloads = Downloads(LoadOptions(models_dir=place.local))
    jobs = [downloads.start(record(model_id)) for model_id in ("org/ended", "org/stuck")]
    arriving(place, "org/ended", MB // 4)
    until(lambda: place.hub.bodies_of("org/stuck", WEIGHTS))
    downloads.close()
    assert all(job.over for job in jobs)
    assert partials(place, "org/ended")[0].stat().st_size >= MB // 8
    with pytest.raises(Cancelled):
        downloads.start(record("org/ended"))


def test_a_folder_of_the_models_folder_needs_no_download(place: Place, downloads: Downloads) -> None:
    fill(place.local / "org/own", MB)
    publish(place, "org/own", MB)
    with place.hub.recording() as made:
        job = downloads.start(record("org/own"))
        assert done(job) == downloads.folder(record("org/own"), Progress()) == place.local / "org/own"
        assert downloads.present(record("org/own")) == place.local / "org/own"
    assert job.progress.now().phase == "ready"
    assert made == []


def test_a_file_of_the_cache_that_was_cut_short_is_fetched_again(place: Place, downloads: Downloads) -> None:
    repository = publish(place, "org/short")
    folder = done(downloads.start(record("org/short")))
    (folder / WEIGHTS).resolve().write_bytes(b"cut")
    assert same(repository, done(downloads.start(record("org/short"))))
    assert len(place.hub.bodies_of("org/short", WEIGHTS)) == 2


class Terminal(io.StringIO):
    """What is drawn on a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_servers_terminal_shows_a_bar_for_each_download(place: Place) -> None:
    terminal = Terminal()
    downloads = Downloads(LoadOptions(models_dir=place.local), terminal=terminal)
    publish(place, "org/drawn").rate[WEIGHTS] = MB
    done(downloads.start(record("org/drawn")))
    until(lambda: terminal.getvalue().endswith("\n"))
    assert "100%" in terminal.getvalue()
    assert "org/drawn" in terminal.getvalue()
    assert "B/s" in terminal.getvalue()
    shown = terminal.getvalue()
    done(downloads.start(record("org/drawn")))  # nothing to bring: nothing to draw
    time.sleep(0.3)
    assert terminal.getvalue() == shown
    downloads.close()


# Over HTTP ------------------------------------------------------------------------------------------------------------


def route(model_id: str) -> str:
    """The route of a model's download."""
    return f"/models/{model_id}/download"


def serve(place: Place, *model_ids: str, **environment: str) -> Server:
    """A server with these models registered."""
    server = place.serve(**environment)
    for model_id in model_ids:
        server.add(model_id, "text-generation")
    return server


def events(server: Server, model_id: str) -> Iterator[Any]:
    """The events of a streamed download; None for a comment."""
    with server.call("POST", route(model_id), json={"stream": True}, stream=True) as answer:
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for line in answer.iter_lines(chunk_size=1):
            if line:
                assert line.startswith((b"data: ", b":"))
                yield json.loads(line[6:]) if line.startswith(b"data: ") else None


def test_a_download_is_asked_for_and_watched_over_http(place: Place) -> None:
    repository = publish(place, "org/watched")
    repository.rate[WEIGHTS] = 2 * MB
    server = serve(place, "org/watched")
    answer = server.call("GET", route("org/watched"))
    assert (answer.status_code, answer.json()["error"]) == (404, "No download of model 'org/watched'")
    assert server.call("DELETE", route("org/watched")).status_code == 404
    answer = server.call("POST", route("org/watched"))
    assert answer.json()["message"] == "Download of model 'org/watched' started"
    assert answer.json()["download"]["commit"] == repository.commit
    answer = server.call("POST", route("org/watched"), json={"stream": False})
    assert answer.json()["message"] == "Download of model 'org/watched' is under way"
    arriving(place, "org/watched", MB)
    state = server.call("GET", route("org/watched")).json()["download"]
    assert (state["model_id"], state["revision"], state["phase"], state["file"]) == (
        "org/watched",
        None,
        "download",
        WEIGHTS,
    )
    assert (
        0
        < state["bytes_done"]
        < state["bytes_total"]
        == sum(path.stat().st_size for path in repository.files().values())
    )
    assert 0 < state["fraction"] < 1
    assert state["bytes_per_second"] > MB // 2
    until(lambda: server.call("GET", route("org/watched")).json()["download"]["phase"] == "ready")
    answer = server.call("POST", route("org/watched"))
    assert answer.json()["message"] == "Model 'org/watched' is here already"
    assert answer.json()["download"]["fraction"] == 1
    assert place.hub.downloads("org/watched").count(WEIGHTS) == 1
    last = list(events(server, "org/watched"))[-1]
    assert (last["success"], last["message"]) == (True, "Model 'org/watched' is here already")


def test_events_tell_of_a_download_and_a_client_that_leaves_does_not_end_it(place: Place) -> None:
    publish(place, "org/streamed").rate[WEIGHTS] = MB
    server = serve(place, "org/streamed")
    for event in events(server, "org/streamed"):
        if event["bytes_total"] and event["bytes_done"] > MB // 4:
            break  # this client leaves
    started = time.monotonic()
    told = [event for event in events(server, "org/streamed") if event]
    took = time.monotonic() - started
    assert took > 1
    *steps, last = told
    assert 3 < len(steps) <= took / 0.1 + 2
    assert [step["bytes_done"] for step in steps] == sorted(step["bytes_done"] for step in steps)
    assert last["success"]
    assert last["message"] == "Model 'org/streamed' is downloaded"
    assert last["download"]["phase"] == "ready"
    assert len(place.hub.bodies_of("org/streamed", WEIGHTS)) == 1


def test_a_stream_is_kept_alive_in_silence_and_told_of_the_failure(place: Place) -> None:
    publish(place, "org/mute").stall = frozenset({WEIGHTS})
    server = serve(place, "org/mute", HF_HUB_DOWNLOAD_TIMEOUT="3")
    told = list(events(server, "org/mute"))
    assert None in told
    assert told[-1]["success"] is False
    assert "cannot be reached" in told[-1]["error"]


def test_a_stream_of_a_download_that_is_cancelled_ends_with_that(place: Place) -> None:
    publish(place, "org/dropped").rate[WEIGHTS] = MB
    server = serve(place, "org/dropped")
    stream = events(server, "org/dropped")
    next(stream)
    answer = server.call("DELETE", route("org/dropped"))
    assert answer.json()["message"] == "Download of model 'org/dropped' cancelled; what has arrived is kept"
    assert list(stream)[-1] == {"success": False, "error": "The download was cancelled"}
    assert server.call("GET", route("org/dropped")).json()["download"]["phase"] == "cancelled"


def test_what_a_killed_server_began_is_shown_and_gone_on_with_after_its_restart(place: Place) -> None:
    repository = publish(place, "org/restart")
    repository.rate[WEIGHTS] = 2 * MB
    server = serve(place, "org/restart")
    server.call("POST", route("org/restart"))
    arriving(place, "org/restart", MB)
    server.stop(signal.SIGKILL)
    repository.rate.clear()
    server = serve(place, "org/restart")
    state = server.call("GET", route("org/restart")).json()["download"]
    assert state["phase"] == "interrupted"
    assert state["bytes_done"] == partials(place, "org/restart")[0].stat().st_size > MB // 2
    *_, last = events(server, "org/restart")
    assert last["success"]
    _, second = place.hub.bodies_of("org/restart", WEIGHTS)
    assert (second.start, second.start + second.count) == (
        state["bytes_done"],
        (repository.folder / WEIGHTS).stat().st_size,
    )


def test_a_server_that_is_told_to_stop_does_so_in_mid_download_and_keeps_what_came(place: Place) -> None:
    publish(place, "org/term").rate[WEIGHTS] = MB
    publish(place, "org/term-stuck").stall = frozenset({WEIGHTS})
    server = serve(place, "org/term", "org/term-stuck", HF_HUB_DOWNLOAD_TIMEOUT=str(PATIENCE))
    for model_id in ("org/term", "org/term-stuck"):
        server.call("POST", route(model_id))
    arriving(place, "org/term", MB // 2)
    assert server.stop() == 0
    assert partials(place, "org/term")[0].stat().st_size >= MB // 4


def test_a_download_that_cannot_begin_has_the_status_of_its_failure(place: Place) -> None:
    publish(place, "org/closed", MB).gated = True
    publish(place, "org/vast", MB).sizes[WEIGHTS] = 10**15
    server = serve(place, "org/closed", "org/vast", "org/none")
    refused(server.call("POST", route("org/closed")), 403, "org/closed", "HF_TOKEN")
    refused(server.call("POST", route("org/vast"), json={"stream": True}), 507, "org/vast", "free")
    refused(server.call("POST", route("org/none")), 404, "org/none", "Check the id")
    state = server.call("GET", route("org/vast")).json()["download"]
    assert state["phase"] == "failed"
    assert "free" in state["error"]
    for method in ("POST", "GET", "DELETE"):
        refused(server.call(method, route("org/stranger")), 404, "org/stranger")
    assert server.call("POST", route("org/none"), json={"quick": True}).status_code == 400


def test_a_load_shares_the_download_that_is_under_way(place: Place) -> None:
    place.publish("org/loaded").rate[WEIGHTS] = 100_000
    server = serve(place, "org/loaded")
    server.call("POST", route("org/loaded"))
    assert works(server, "org/loaded")
    assert place.hub.downloads("org/loaded").count(WEIGHTS) == 1
