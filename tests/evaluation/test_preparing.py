"""Batches are prepared in processes of their own: in order, whatever becomes of one, and without leaving anything behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
from miniatures import write_zero_shot_qa
from tiny import tiny_processor

from video_panda.evaluation import preparing
from video_panda.evaluation.benchmarks import open_benchmark
from video_panda.evaluation.preparing import Preparation, prepare_all
from video_panda.evaluation.shared_buffer import SharedBuffer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread prepares the batches")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    return open_benchmark("msvd-qa", write_zero_shot_qa(folder / "data", folder / "clips", num_clips=6))


@pytest.fixture
def preparation(benchmark):
    return Preparation(tiny_processor(), benchmark, {"num_frames": None}, "{question}")


def batches_of(benchmark, size=2):
    questions = benchmark.questions
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def test_they_are_those_of_this_process_in_order(preparation, benchmark):
    batches, others = batches_of(benchmark), psutil.Process().children()
    num_seen = 0
    for batch, prepared in zip(batches, prepare_all(preparation, batches), strict=True):
        here = preparation.prepare(batch)
        assert [question.id for question in prepared.questions] == [question.id for question in batch]
        assert prepared.errors == here.errors == {}
        assert prepared.inputs.keys() == here.inputs.keys()
        assert all(torch.equal(prepared.inputs[name], value) for name, value in here.inputs.items())
        num_seen += 1
    assert num_seen == len(batches) > 3
    assert psutil.Process().children() == others


def test_a_thread_does_where_there_is_no_fork(preparation, benchmark, monkeypatch):
    monkeypatch.setattr(preparing.sys, "platform", "darwin")
    before, threads = torch.get_num_threads(), 2
    torch.set_num_threads(threads)
    batches = batches_of(benchmark)
    assert [list(prepared.questions) for prepared in prepare_all(preparation, batches)] == [list(b) for b in batches]
    with ThreadPoolExecutor(1) as later:
        found = later.submit(torch.get_num_threads).result(), torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == (threads, threads), "also threads that begin later have all of them"


def test_a_daemon_which_may_have_no_processes_prepares_too(preparation, benchmark):
    daemon = get_context("fork").Process(
        target=_prepare_and_count, args=(preparation, batches_of(benchmark)), daemon=True
    )
    daemon.start()
    daemon.join(60)
    assert daemon.exitcode == len(batches_of(benchmark))


def _prepare_and_count(preparation, batches):
    torch.set_num_threads(1)
    os._exit(len(list(prepare_all(preparation, batches))))


def test_who_stops_does_not_wait_for_a_clip_that_hangs(preparation, benchmark, monkeypatch):
    batches = batches_of(benchmark)
    hanging, decode = batches[-1][-1].video, Preparation.decode
    monkeypatch.setattr(
        Preparation, "decode", lambda self, own, *a: time.sleep(600) if own.video == hanging else decode(self, own, *a)
    )
    # In a process of its own, which can be ended if it hangs itself.
    caller = get_context("fork").Process(target=_take_one_and_stop, args=(preparation, batches))
    caller.start()
    caller.join(30)
    is_there_still = caller.is_alive()
    caller.kill()
    assert not is_there_still
    assert caller.exitcode == 0


def _take_one_and_stop(preparation, batches):
    torch.set_num_threads(1)
    prepared = prepare_all(preparation, batches[:1] + batches[-1:] * 3)
    next(prepared)
    time.sleep(0.5)
    prepared.close()


def test_a_clip_that_ends_its_process_cannot_be_read_and_the_others_are(preparation, benchmark, monkeypatch, caplog):
    """As an abort in a decoder would: the process is gone at once."""
    batches = batches_of(benchmark)
    deadly = batches[1][0].video
    decode = Preparation.decode

    def abort(self, question, isolate=None):
        if question.video != deadly:
            return decode(self, question, isolate)
        if isolate:
            raise ValueError("it ended the worker process")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Preparation, "decode", abort)
    prepared = list(prepare_all(preparation, batches))
    assert [list(each.questions) for each in prepared] == [list(batch) for batch in batches]
    told = {id: error for each in prepared for id, error in each.errors.items()}
    assert told == {q.id: "ValueError: it ended the worker process" for q in benchmark.questions if q.video == deadly}
    assert "each clip is read in one of its own" in caplog.text


def test_processes_that_end_again_are_an_error(preparation, benchmark, monkeypatch):
    monkeypatch.setattr(Preparation, "decode", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="are ended again and again"):
        list(prepare_all(preparation, batches_of(benchmark)))


def test_an_error_of_the_processor_is_the_error_of_the_caller(preparation, benchmark, monkeypatch):
    def fail(*args):
        raise KeyError("no chat template")

    monkeypatch.setattr(Preparation, "make_inputs", fail)
    with pytest.raises(KeyError, match="no chat template"):
        list(prepare_all(preparation, batches_of(benchmark)))


_PREPARES_FOR_EVER = """
import sys
sys.path.insert(0, sys.argv[1])
from tiny import tiny_processor
from video_panda.evaluation.benchmarks import open_benchmark
from video_panda.evaluation.preparing import Preparation, prepare_all
benchmark = open_benchmark("msvd-qa", sys.argv[2])
batches = [benchmark.questions[:1]] * 10_000
for _ in prepare_all(Preparation(tiny_processor(), benchmark, {}, "{question}"), batches):
    print("prepared", flush=True)
"""


def test_no_process_outlives_a_caller_that_is_killed(benchmark, tmp_path):
    data = write_zero_shot_qa(tmp_path / "data", tmp_path / "clips", num_clips=2)
    command = [sys.executable, "-c", _PREPARES_FOR_EVER, str(Path(__file__).parents[1]), str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as caller:
        assert caller.stdout.readline() == b"prepared\n"
        workers = psutil.Process(caller.pid).children()
        assert workers
        caller.kill()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert gone
    assert not alive


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"empty": torch.zeros(0, 3)},
        {"scalar": torch.tensor(3), "mask": torch.tensor([True, False, True]), "ids": torch.arange(7)},
        {"half": torch.rand(3, 5).bfloat16(), "turned": torch.rand(4, 6).T, "pixels": torch.rand(2, 3, 100, 100)},
    ],
    ids=lambda tensors: "+".join(tensors) or "none",
)
def test_tensors_arrive(tensors):
    buffer, context = SharedBuffer(), get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=lambda: theirs.send(buffer.fill(tensors)))
    child.start()
    assert ours.poll(60)
    received = buffer.look(ours.recv())
    child.join()
    buffer.close()
    assert received.keys() == tensors.keys()
    assert all(torch.equal(received[name], value) for name, value in tensors.items())
    assert all(received[name].dtype == value.dtype for name, value in tensors.items())


def test_a_buffer_is_filled_again_with_more_and_with_less():
    ours, seen = SharedBuffer(), []
    for size in (3, 100_000, 10, 200_000):
        value = torch.full((size,), float(size))
        seen.append(ours.look(ours.fill({"value": value}))["value"])
        assert torch.equal(seen[-1], value)
    assert seen[0][0] == seen[2][0] == 200_000, "it is the same memory"
    ours.close()


def test_inputs_need_no_space_in_dev_shm_and_leave_nothing(preparation, benchmark):
    files = len(os.listdir("/proc/self/fd"))
    before = Path("/proc/self/maps").read_text().count("/dev/shm/torch")
    batches = batches_of(benchmark)
    num_buffers = 0
    for _prepared in prepare_all(preparation, batches):
        maps = Path("/proc/self/maps").read_text()
        num_buffers = max(num_buffers, maps.count("/memfd:video_panda"))
        assert maps.count("/dev/shm/torch") == before
    assert 1 <= num_buffers < len(batches), "their memory is used again"
    del _prepared
    assert len(os.listdir("/proc/self/fd")) <= files
    assert "/memfd:video_panda" not in Path("/proc/self/maps").read_text()
