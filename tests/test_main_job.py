"""The main job on real input: convert the release's checkpoint, load it elsewhere, ask about three clips in one batch."""

import json
import math

import pytest
from hub_server import HubServer, run_client
from tiny import tiny_tokenizer

from video_panda import convert_checkpoint

CLIPS = {"sample_demo_1.mp4": [8, 2, 3], "flipping_a_pancake.mkv": [8, 2, 3], "video_90.mov": [8, 3, 2]}

ASK = """
import json, sys
from transformers import AutoModel, AutoProcessor

folder, *clips = {arguments!r}
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

def ask(clips):
    chats = [[{{"role": "user", "content": [{{"type": "video", "path": clip}}, {{"type": "text", "text": "What happens?"}}]}}]
             for clip in clips]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    return inputs, output[:, inputs["input_ids"].shape[1]:].tolist()

inputs, together = ask(clips)
report = {{
    "grids": inputs["video_grid_thw"].tolist(),
    "padding": (inputs["attention_mask"] == 0).sum(1).tolist(),
    "starts_with_padding": all(row[0] == 0 for row in inputs["attention_mask"].tolist() if 0 in row),
    "together": together,
    "alone": [ask([clip])[1][0] for clip in clips],
    "has_package": sys.modules.get("video_panda") is not None,
}}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def converted(golden_folder, tmp_path_factory):
    """The golden checkpoint, with a word-level tokenizer of fewer words than it has embeddings."""
    folder = tmp_path_factory.mktemp("main_job") / "converted"
    tokenizer = tiny_tokenizer("words")
    assert len(tokenizer) < 128
    return convert_checkpoint(
        golden_folder / "official_tiny" / "checkpoint", folder, tokenizer=tokenizer, progress=False
    )


def test_three_real_clips_in_one_left_padded_batch(converted, video_folder, tmp_path):
    arguments = [str(converted), *(str(video_folder / name) for name in CLIPS)]
    with HubServer(lfs_threshold_bytes=math.inf) as server:
        process = run_client(ASK.format(arguments=arguments), server, tmp_path / "home", blocked=("video_panda",))
    report = json.loads(process.stdout.splitlines()[-1])
    assert not report["has_package"]
    assert report["grids"] == list(CLIPS.values())
    assert min(report["padding"]) == 0
    assert max(report["padding"]) > 0
    assert report["starts_with_padding"]
    assert report["together"] == report["alone"]
    assert [len(answer) for answer in report["together"]] == [12, 12, 12]
