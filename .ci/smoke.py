"""Smoke test of the *installed* package: `python .ci/smoke.py`, from any folder that is not the checkout.

A tiny model with random weights goes the way of a user's first minutes: build, save, load in a fresh process that
cannot see the package (so that only the code saved beside the weights is used), and generate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
NUM_NEW_TOKENS = 4


def check_where_it_is_installed() -> None:
    import video_panda

    found = Path(video_panda.__file__).resolve()
    assert "site-packages" in found.parts, f"expected the installed wheel, got {found}"
    assert CHECKOUT not in (found, *found.parents), f"expected the installed wheel, got the checkout: {found}"
    assert video_panda.__version__ == metadata.version("video-panda")


def check_what_is_installed() -> None:
    """Every module of the checkout's package folders and the package data are in the wheel, and nothing else is."""
    modules = {*CHECKOUT.glob("*.py")}
    for marker in CHECKOUT.glob("*/__init__.py"):
        modules |= {*marker.parent.rglob("*.py")}
    modules |= {*(CHECKOUT / "default_model").glob("*.py")}
    expected = {f"video_panda/{path.relative_to(CHECKOUT).as_posix()}" for path in modules}
    installed = {file.as_posix() for file in metadata.files("video-panda") if file.parts[0] == "video_panda"}
    found = {name for name in installed if name.endswith(".py")}
    assert found == expected, f"only in the wheel or only in the checkout: {sorted(found ^ expected)}"
    data = {"model_card.md", *(f"default_model/{path.name}" for path in (CHECKOUT / "default_model").iterdir())}
    missing = sorted(name for name in data if f"video_panda/{name}" not in installed)
    assert not missing, f"missing from the wheel: {missing}"


def check_default_model() -> None:
    """What the installed package answers about its own clip without a `--model`."""
    import video_panda

    folder = Path(video_panda.__file__).parent / "default_model"
    for question, truth in json.loads((folder / "example.json").read_text()).items():
        answer = check_command("ask", str(folder / "example.mp4"), question)
        assert answer == truth, f"{question} {answer}, expected {truth}"


def check_command(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "video-panda"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    assert result.stdout.strip(), f"{command} printed nothing"
    return result.stdout.strip()


def build_tiny_checkpoint(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig

    from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration

    llm = LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    stab = {"image_size": 84, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = VideoPandaForConditionalGeneration(VideoPandaConfig.from_text_config(llm, vision_config=stab))
    model.save_pretrained(folder)


def generate(model) -> list[int]:
    """The ids that follow a prompt with one video of 8 random frames, 3 x 3 tokens each."""
    import torch

    config = model.config
    row = [config.video_token_id] * 3 + [config.row_token_id]
    frame = [config.frame_token_id, *row, *row, *row]
    input_ids = torch.tensor([[1, 10, 11, *(frame * 8), 12, 13]])
    pixels = torch.rand(1, 8, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    output = model.eval().generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values_videos=pixels,
        video_grid_thw=torch.tensor([[8, 3, 3]]),
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
    )
    return output[0, input_ids.shape[1] :].tolist()


def load_without_package(folder: Path) -> list[int]:
    """Load and generate in this process, in which `import video_panda` is made to fail."""
    sys.modules["video_panda"] = None
    from transformers import AutoModel

    return generate(AutoModel.from_pretrained(folder, trust_remote_code=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, help="only load this checkpoint, and print the ids it generates")
    arguments = parser.parse_args()
    if arguments.load:
        print("ids:", *load_without_package(arguments.load))
        return

    check_where_it_is_installed()
    check_what_is_installed()
    check_command("--help")
    check_command("info", "--help")
    check_default_model()
    with tempfile.TemporaryDirectory() as name:
        # Nothing of an earlier run is read, and nothing is left in the user's cache.
        os.environ.update(HF_HOME=str(Path(name) / "hub"), HF_HUB_OFFLINE="1")
        checkpoint = Path(name) / "checkpoint"
        build_tiny_checkpoint(checkpoint)
        from video_panda import VideoPandaForConditionalGeneration

        expected = generate(VideoPandaForConditionalGeneration.from_pretrained(checkpoint))
        assert len(expected) == NUM_NEW_TOKENS, expected
        fresh = subprocess.run(
            [sys.executable, __file__, "--load", str(checkpoint)], stdout=subprocess.PIPE, text=True, check=True
        )
        got = [int(word) for word in fresh.stdout.rsplit("ids:", 1)[1].split()]
        assert got == expected, f"the saved code generates {got}, the installed package {expected}"
        check_command("info", str(checkpoint))
    print("smoke test passed")


if __name__ == "__main__":
    main()
