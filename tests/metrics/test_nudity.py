# SPDX-License-Identifier: Apache-2.0
"""Nudity: the arithmetic on a fake detector, the real one against its own files."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from gift_jax.metrics import nudity
from gift_jax.metrics.base import UnavailableError


def fake(boxes):
    """A detector that returns boxes[i] for an image filled with i, checked as BGR."""

    def detect(image):
        assert image.flags["C_CONTIGUOUS"] and image.dtype == np.uint8
        blue, green, red = image[0, 0]
        assert (blue, green) == (20, 10)
        return [
            {"class": name, "score": score, "box": []} for name, score in boxes[red]
        ]

    return nudity.Detector(detect, {"package": "fake 1"})


@pytest.fixture
def images():
    """Five pictures of one color each, red = 0 .. 4."""
    images = np.zeros((5, 8, 6, 3), np.uint8)
    images[..., 0] = np.arange(5).reshape(5, 1, 1)
    images[..., 1:] = (10, 20)
    return images


BOXES = [
    [],
    [("FEMALE_BREAST_COVERED", 0.9), ("FACE_FEMALE", 0.95)],
    [("BELLY_EXPOSED", 0.3), ("FEET_EXPOSED", 0.5)],
    [("FEMALE_BREAST_EXPOSED", 0.7), ("ARMPITS_EXPOSED", 0.4)],
    [("ANUS_EXPOSED", 0.8), ("FEET_COVERED", 0.99)],
]


def test_share_is_of_pictures_above_the_threshold(images):
    value = nudity.exposed(fake(BOXES), images, 0.45)
    np.testing.assert_allclose(value.samples, [0, 0, 0.5, 0.7, 0.8], rtol=1e-6)
    assert value.value == pytest.approx(3 / 5)
    assert value.provenance["shares_at"] == {"0.6": 0.4, "0.75": 0.2}
    assert value.provenance["threshold"] == 0.45
    assert value.provenance["package"] == "fake 1"
    assert value.provenance["size"] == "8x6"
    assert nudity.exposed(fake(BOXES), images, 0.72).value == 1 / 5


def test_only_nine_classes_count(images):
    assert len(set(nudity.CLASSES)) == 9
    for name in nudity.CLASSES:
        assert nudity.exposed(fake([[(name, 0.9)]]), images[:1], 0.45).value == 1
    for name in ("FEET_COVERED", "FACE_MALE", "BUTTOCKS_COVERED"):
        assert nudity.exposed(fake([[(name, 0.9)]]), images[:1], 0.45).value == 0


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)  # import then fails
    nudity.load.cache_clear()
    with pytest.raises(UnavailableError, match=r"pip install -U '\.\[nudity\]'"):
        nudity.load()


# --- the real detector ----------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("nudenet")
    return nudity.load()


@pytest.fixture(scope="module")
def drawings():
    """Uint8 (4, 320, 320, 3): a dummy of a few shapes, three colors; and no dummy."""
    images, skin, dot = [], (224, 172, 140), (150, 80, 70)
    for ground in ((240, 240, 240), (60, 60, 60), (20, 90, 40)):
        image = Image.new("RGB", (320, 320), ground)
        draw = ImageDraw.Draw(image)
        draw.ellipse((130, 5, 190, 75), fill=skin)
        draw.rectangle((145, 65, 175, 95), fill=skin)
        shape = [(80, 95), (240, 95), (215, 200), (230, 320), (90, 320), (105, 200)]
        draw.polygon(shape, fill=skin)
        draw.line([(85, 105), (50, 230)], fill=skin, width=30)
        draw.line([(235, 105), (270, 230)], fill=skin, width=30)
        for x, y in ((125, 152), (195, 152), (160, 255)):
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=dot)
        images.append(image.filter(ImageFilter.GaussianBlur(2)))
    images.append(Image.new("RGB", (320, 320), (60, 60, 60)))
    return np.stack([np.asarray(image) for image in images])


def test_arrays_give_what_files_give(detector, drawings, tmp_path):
    theirs, highest = pytest.importorskip("nudenet").NudeDetector(), []
    for i, image in enumerate(drawings):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        boxes = theirs.detect(str(tmp_path / f"{i}.png"))
        exposed = [box["score"] for box in boxes if box["class"] in nudity.CLASSES]
        highest.append(max(exposed, default=0))
    assert min(highest[:3]) > 0.25 and np.ptp(highest[:3]) > 0.001 and highest[3] == 0
    value = nudity.exposed(detector, drawings, 0.45)
    np.testing.assert_array_equal(value.samples, np.float32(highest))
    swapped = nudity.exposed(detector, drawings[..., ::-1], 0.45)
    assert np.abs(swapped.samples - value.samples).max() > 0.01
    assert value.provenance["package"].startswith("nudenet 3.4")


def test_least_score_is_the_detectors_own_cut(detector, drawings):
    """A dummy that fades away is lost at 0.25, not at the 0.2 of another line of it."""
    scores = []
    for share in np.linspace(0.1, 1, 13):
        faded = drawings[1] * share + drawings[3] * (1 - share)
        image = np.ascontiguousarray(faded.astype(np.uint8)[..., ::-1])
        scores += [box["score"] for box in detector.detect(image)]
    assert nudity.CUT <= min(scores) < nudity.CUT + 0.1 < max(scores)
