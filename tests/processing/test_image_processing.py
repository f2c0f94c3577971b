"""Still pictures in every form to the model's image inputs."""

import base64
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from clips import barcode_frame, read_barcode, write_clip
from PIL import Image

from video_panda.processing.canvas_video_panda import CLIP_MEAN, CLIP_STD
from video_panda.processing.image_processing_video_panda import VideoPandaImageProcessor
from video_panda.processing.video_processing_video_panda import VideoPandaVideoProcessor

PIXELS = barcode_frame(682, 160, 96)


@pytest.fixture(scope="module")
def processor():
    return VideoPandaImageProcessor()


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def raw(processor, images):
    """The uint8 canvases."""
    return processor(images, do_rescale=False, do_normalize=False)["pixel_values"]


def test_output(processor):
    output = processor(Image.fromarray(PIXELS))
    assert output["pixel_values"].dtype == torch.float32
    assert tuple(output["pixel_values"].shape) == (1, 3, 448, 448)
    assert output["image_grid_thw"].dtype == torch.int64
    assert output["image_grid_thw"].tolist() == [[1, 10, 16]]
    canvas = raw(processor, Image.fromarray(PIXELS))[0]
    assert read_barcode(canvas[:, 84:364].permute(1, 2, 0)) == 682
    assert canvas[:, :84].amax((1, 2)).tolist() == [math.floor(255 * mean) for mean in CLIP_MEAN]
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    assert torch.allclose(output["pixel_values"][0], (canvas / 255 - mean) / std, atol=1e-5)


def test_the_same_canvas_as_a_video_of_one_frame(processor):
    video = VideoPandaVideoProcessor()([Image.fromarray(PIXELS)])
    assert torch.equal(processor(PIXELS)["pixel_values"], video["pixel_values_videos"][0])
    assert video["video_grid_thw"].tolist() == processor(PIXELS)["image_grid_thw"].tolist()


def test_the_forms_of_a_picture(processor, tmp_path):
    image = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    text = base64.b64encode(encoded(image)).decode()
    expected = raw(processor, image)
    for same in (
        path,
        str(path),
        encoded(image),
        text,
        f"data:image/png;base64,{text}",
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS),
        (PIXELS / 255).astype(np.float32),
        PIXELS[None],
        [image],
        [[image]],
    ):
        assert torch.equal(raw(processor, same), expected)


def test_many_pictures_of_different_shapes(processor):
    output = processor([[Image.new("RGB", (100, 50)), Image.new("RGB", (50, 100))], [Image.new("RGB", (7, 7))]])
    assert output["image_grid_thw"].tolist() == [[1, 8, 16], [1, 16, 8], [1, 16, 16]]
    assert tuple(output["pixel_values"].shape) == (3, 3, 448, 448)
    assert processor(np.zeros((4, 50, 100, 3), np.uint8))["image_grid_thw"].tolist() == [[1, 8, 16]] * 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "I;16"])
def test_other_colour_modes(processor, mode):
    gray = Image.new("L", (32, 32), 255)
    if mode == "I;16":
        image = Image.fromarray(np.full((32, 32), 65535, np.uint16))
    else:
        image = gray.convert("RGBA").convert(mode) if mode == "LA" else gray.convert("RGB").convert(mode)
    canvas = raw(processor, image)
    assert tuple(canvas.shape) == (1, 3, 448, 448)
    assert canvas.min() == 255
    dark = Image.fromarray(np.full((32, 32), 30000, np.uint16))
    assert raw(processor, dark).float().mean() == pytest.approx(30000 / 257, abs=1)
    with pytest.raises(ValueError, match=r"mode '.*RGB"):
        processor(image, do_convert_rgb=False)


def test_gray_arrays(processor):
    assert raw(processor, np.full((20, 30), 200, np.uint8))[0, :, 200, 200].tolist() == [200, 200, 200]
    assert processor(np.zeros((20, 30, 1), np.uint8))["image_grid_thw"].tolist() == [[1, 11, 16]]


def test_exif_orientation_is_applied(processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture has to be turned by a quarter, clockwise
    stored = encoded(Image.fromarray(np.rot90(PIXELS)), "PNG", exif=exif)
    assert torch.equal(raw(processor, stored), raw(processor, PIXELS))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "empty list"),
        ([[]], "empty list"),
        (None, "NoneType"),
        (3, "int"),
        (b"", "0 bytes"),
        (b"not a picture", "13 bytes in memory.*not a picture"),
        ("data:image/png;base64,????", "base64"),
        (np.zeros((3,), np.uint8), r"\(3,\)"),
        (np.zeros((8, 8, 5), np.uint8), "channels"),
        (np.full((8, 8, 3), 3.0), r"\[0, 1\]"),
        ("https://localhost:9/a.png", "allow_urls"),
    ],
)
def test_bad_pictures(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images)


def test_bad_files(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        processor(str(tmp_path / "none.png"))
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        processor("none/" * 20 + "none.png")
    with pytest.raises(IsADirectoryError):
        processor(tmp_path)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG"))
    cut.write_bytes(cut.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"cut\.jpg.*cannot be decoded"):
        processor(cut)


@pytest.mark.parametrize("options", [{"size": 224}, {"image_size": 450}, {"do_rescale": False}, {"colour": 1}])
def test_bad_options(processor, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        processor(PIXELS, **options)


def test_save_and_load(tmp_path):
    processor = VideoPandaImageProcessor(image_size=84)
    processor.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert stored["auto_map"] == {"AutoImageProcessor": "image_processing_video_panda.VideoPandaImageProcessor"}
    loaded = VideoPandaImageProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(loaded(PIXELS)["pixel_values"], processor(PIXELS)["pixel_values"])
    code = (
        "import sys\n"
        "for name in ('video_panda', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "import numpy\n"
        "from transformers import AutoImageProcessor\n"
        "processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(processor(numpy.zeros((50, 100, 3), 'uint8'))['image_grid_thw'].tolist())\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[1, 2, 3]]"


def test_pictures_that_are_refused_say_why(tmp_path):
    processor = VideoPandaImageProcessor(image_size=84)
    clip = write_clip(tmp_path / "clip.mp4", 3)
    with pytest.raises(ValueError, match=r"clip\.mp4: not a picture that can be read$"):
        processor(clip)
    with pytest.raises(ValueError, match="mode 'F'"):
        processor(Image.new("F", (30, 20), 0.5))
    with pytest.raises(ValueError, match="uint16"):
        processor(np.zeros((8, 8, 3), np.uint16))
    with pytest.raises(FileNotFoundError, match="path is empty"):
        processor("")
    with pytest.raises(ValueError, match="no option `imagesize`; did you mean `image_size`"):
        VideoPandaImageProcessor(imagesize=84)
