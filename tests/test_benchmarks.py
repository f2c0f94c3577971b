"""The speed programs run, and what they say beside the clock is right: parameters, operations, tokens, memory, ratios."""

import json
import multiprocessing.dummy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# By hand: the towers' own counts are known (CLIP ViT-L/14 303.18 M without its projection, LanguageBind 404 M, ...).
MILLION_PARAMETERS = {
    "Video-Panda": 45.07,
    "Video-LLaVA": 404.19 + 20.98,
    "Video-ChatGPT": 303.18 + 4.20,
    "SmolVLM2": 412.99 + 21.23,
    "Qwen3-VL": 576.39,
}
# Of 8 square frames; of 16:9 too, where the system sees a difference.
TOKENS = {
    "Video-Panda": (2184, 1232),
    "Video-LLaVA": (2056,),
    "Video-ChatGPT": (356,),
    "SmolVLM2": (648,),
    "Qwen3-VL": (784, 448),
}


@pytest.fixture
def measure(monkeypatch):
    """The module, its workers threads of this process: a process of its own imports for seconds."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    monkeypatch.setattr(measure, "CONTEXT", multiprocessing.dummy)
    return measure


@pytest.fixture
def peers(measure):
    return {peer.name: peer for peer in measure.peers.PEERS}


@pytest.mark.parametrize("name", TOKENS)
def test_a_peer_has_the_published_size_and_gives_the_published_tokens(measure, peers, name):
    part = peers[name].build(8, device="meta")
    assert sum(parameter.numel() for parameter in part.parameters()) / 1e6 == pytest.approx(
        MILLION_PARAMETERS[name], abs=0.02
    )
    for is_wide, num_tokens in enumerate(TOKENS[name]):
        tokens = part(**part.inputs(8, bool(is_wide), "meta", torch.float32))
        assert tokens.shape == (num_tokens, peers[name].llm_width)


def test_operations_of_clip_are_those_of_its_products(measure, peers):
    positions, width, frames = 257, 1024, 8
    layer = 12 * width**2 + 2 * positions * width  # attention's and MLP's layers; scores and weighted sum
    expected = 24 * frames * positions * layer + frames * 256 * 3 * 14**2 * width + 356 * width * 4096
    assert measure.count(measure.Setting(peers["Video-ChatGPT"], frames)).num_operations == 2 * expected


@pytest.mark.parametrize("name", ["Video-LLaVA", "SmolVLM2", "Qwen3-VL"])
def test_operations_are_the_same_with_weights_and_without(measure, peers, name):
    setting = measure.Setting(peers[name].tiny(), 4)
    part, make_inputs = setting.build()
    assert measure._count(part, make_inputs(4)) == measure.count(setting)


def test_operations_of_video_panda_grow_with_its_frames_alone(measure, peers):
    counts = [measure.count(measure.Setting(peers["Video-Panda"].tiny(), frames)) for frames in (8, 16)]
    assert counts[1].num_operations == pytest.approx(2 * counts[0].num_operations, rel=0.02)
    assert counts[1].num_tokens == 2 * counts[0].num_tokens


class Allocating(nn.Module):
    """Takes 64 MiB for a moment and gives back one number."""

    def __init__(self, peer, num_frames, frame_px):
        super().__init__()

    def inputs(self, num_frames, is_wide, device, dtype):
        return {"one": torch.ones(1, device=device, dtype=dtype)}

    def forward(self, one):
        return one.expand(2**24).clone().mean(0, keepdim=True)


class Failing(Allocating):
    def forward(self, one):
        raise ArithmeticError("as it does")


def test_a_worker_tells_the_peak_of_a_pass_and_takes_its_time(measure):
    peer = replace(measure.MATRIX_PRODUCT, part=Allocating)
    with measure.start_workers({"it": measure.Setting(peer, 1)}) as workers:
        worker = workers["it"]
        assert worker.take_turn(0) > 0
        assert len(worker.seconds) == 1
        assert worker.peak_bytes / 2**20 == pytest.approx(64, abs=8)
        worker.take_turn(0.05)
        assert sum(worker.seconds[1:]) >= 0.05 or len(worker.seconds) == 1 + measure.MAX_PASSES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_fails_is_an_error_and_no_wait(measure):
    peer = replace(measure.MATRIX_PRODUCT, part=Failing, is_counted_on_meta=False)
    with (
        pytest.raises(RuntimeError, match="matrix product ended"),
        measure.start_workers({"it": measure.Setting(peer, 1)}),
    ):
        pass


def test_ratios_are_of_the_same_step(measure):
    # The machine is four times slower in the second step; the third knows nothing of b.
    steps = [{"a": 1.0, "b": 2.0}, {"a": 4.0, "b": 8.0}, {"a": 100.0}]
    assert measure.ratio(steps, "b", "a") == 2.0


def run_quick(name: str, folder: Path) -> dict:
    """What the program keeps; it must have written its page too."""
    program = __import__(name)
    assert program.main(["--quick", "--dtype", "float32", "--output", str(folder)]) == 0
    assert (folder / f"{name}.md").read_text().startswith("# ")
    return json.loads((folder / f"{name}.json").read_text())


def test_vision_measures_all_systems_and_checks_its_targets(measure, tmp_path):
    found = run_quick("vision", tmp_path)["found"]["float32"]
    assert set(found["systems"]) == {*TOKENS, "Video-Panda, 16:9"}
    for system in found["systems"].values():
        assert all(system[key] > 0 for key in ("parameters", "operations", "milliseconds", "tokens", "over_floor"))
    assert found["systems"]["Video-Panda"]["times_video_panda"] == 1.0
    is_measured = (BENCHMARKS / "results" / "vision_cuda.md").exists()
    assert ("The CUDA column is not measured yet" in (tmp_path / "vision.md").read_text()) is not is_measured


def test_a_target_that_is_missed_is_seen(measure):
    import vision

    options = vision.parse(vision.make_parser(""), [])
    slow = {"over_floor": 1.21, "times_video_panda": 1.0, "milliseconds": 900.0}
    fast = {"over_floor": 1.19, "times_video_panda": 11.9, "milliseconds": 9000.0}
    held = vision.check(
        options, {"float32": {"systems": {"Video-Panda": slow, "Video-Panda, 16:9": fast, "Video-LLaVA": fast}}}
    )
    assert [holds for *_, holds in held] == [False, True, False]


def test_scaling_draws_and_counts(measure, tmp_path):
    found = run_quick("scaling", tmp_path)
    assert set(found["gflop"]) == set(TOKENS)
    assert (tmp_path / "scaling.svg").read_text().lstrip().startswith("<?xml")
    for lines in found["gflop"].values():
        (few, little), (many, much) = lines["frames"]
        # Video-ChatGPT always hands over 100 tokens of frames; LanguageBind's frames see each other.
        assert much / little == pytest.approx(many / few, rel=0.1)


def test_memory_takes_both_ways(measure, tmp_path):
    import memory

    points = run_quick("memory", tmp_path)["found"]["float32"]
    assert [point["frames"] for point in points] == [8, 16]
    assert memory.growth(points) == pytest.approx(1, abs=0.02)
    few, many = (memory.beyond_result(point, "all chunks at once") for point in points)
    assert 0 < 1.5 * few < many
    assert all(
        point[way]["peak_bytes"] >= 0 for point in points for way in ("all chunks at once", "one after the other")
    )
    assert points[1]["result_bytes"] == 2 * points[0]["result_bytes"]


def test_pipeline_prepares_what_pil_does(measure, tmp_path, monkeypatch):
    import pipeline

    monkeypatch.setattr(pipeline, "seconds_of", lambda program: 0.5)  # a process each
    found = run_quick("pipeline", tmp_path)
    for own in found["preprocessing"].values():
        assert own["most_levels_apart"] <= 2.5  # two roundings of PIL's against one
        assert own["float_canvases"] < 2
    assert len(found["request"]["whole first"]) == 1


@pytest.mark.slow
def test_the_command_runs_with_processes_of_its_own(tmp_path):
    command = [sys.executable, BENCHMARKS / "vision.py", "--quick", "--output", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert set(json.loads((tmp_path / "vision.json").read_text())["found"]) == {"float32", "bfloat16"}
