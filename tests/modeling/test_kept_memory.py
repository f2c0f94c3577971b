"""The vision part has glibc keep the memory of its states for the next tensors: counted in page faults."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

_COUNT_FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from model_inputs import canvases
from tiny import tiny_config, tiny_model

def new_pages():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(6 * 2**20)  # 24 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

model = tiny_model(tiny_config(vision={"hidden_size": 4096, "image_size": 448}))
before = new_pages()
with torch.no_grad():
    model.model.get_video_features(torch.zeros(1, 1, 3, 448, 448), torch.tensor([[1, 1, 1]]))
new_pages()
print(before, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_large_tensors_get_memory_that_was_given_back():
    command = [sys.executable, "-c", _COUNT_FAULTS, str(Path(__file__).parents[1])]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = map(int, told.stdout.split())
    assert before > 5000, "each page of 4 KiB is new"
    assert after < 100
