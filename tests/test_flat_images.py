"""A flat image does not outweigh the others, because no stem begins with biases of 0."""

from __future__ import annotations

import pytest

from experiments import flat_images

SMALL = [name for name in flat_images.NETWORKS if not name.startswith(("kndensenet", "knconformer"))]


def ratio(name: str, biases: str) -> float:
    """Gradient of a flat image over that of a random one."""
    norms = dict(flat_images.gradients(name, biases))
    return max(norms["flat"], norms["half flat"]) / norms["random"]


@pytest.mark.parametrize("name", SMALL)
def test_a_flat_image_does_not_outweigh_the_others(name):
    assert ratio(name, "as built") < 5


@pytest.mark.parametrize("name", ["kncifar_resnet8x2", "convert(cifar_resnet8x2)"])
def test_with_biases_near_zero_it_does(name):
    assert ratio(name, "SD 0.0001") > 100


def test_table(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_images, "NETWORKS", SMALL[:1])
    assert flat_images.section(tmp_path / "flat_images.csv") == ""
    flat_images.flat_images(tmp_path / "flat_images.csv")
    lines = flat_images.section(tmp_path / "flat_images.csv").splitlines()
    assert [len(line.split("|")) for line in lines[-3:]] == [8, 8, 8] and SMALL[0] in lines[-1]
