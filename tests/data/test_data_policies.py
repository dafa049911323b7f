"""Torchvision's policies made deterministic, and all augmentations by name."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from instar.data.augment import Augmentation, Flip, NoAugmentation, PadCrop, standard
from instar.data.augmentations import AUGMENTATIONS, augmentation
from instar.data.catalogue import CATALOGUE
from instar.data.erasing import Cutout, RandomErasing
from instar.data.idbh import ColorShape, CropShift, idbh
from instar.data.policies import Policy
from instar.errors import UserError

NAMES = ("autoaugment", "randaugment", "trivialaugment", "augmix")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 24, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(30, 220, (count, channels, 16, 16), dtype=torch.uint8, generator=generator(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_range_are_kept(name: str, channels: int) -> None:
    images, policy = pixels(channels=channels), Policy(name)  # type: ignore[arg-type]
    found = policy(images, generator())
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert not torch.equal(found, images)
    floats = policy(images.float() / 255, generator())
    assert floats.dtype == torch.float32
    assert torch.equal(floats, found.float() / 255)  # in [0, 1], and the same picture
    for between in (-0.4, 0.4):  # the nearest level counts
        assert torch.equal(policy((images.float() + between) / 255, generator()), floats)
    assert policy(images[:0], generator()).shape == (0, channels, 16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_each_image_gets_torchvisions_policy_with_its_own_draw(name: str) -> None:
    library = {
        "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        "randaugment": v2.RandAugment(num_ops=2, magnitude=9),
        "trivialaugment": v2.TrivialAugmentWide(),
        "augmix": v2.AugMix(severity=3, mixture_width=3),
    }[name]
    images = pixels(16)
    found = Policy(name)(images, generator(5))  # type: ignore[arg-type]
    seeds = torch.randint(2**63 - 1, (16,), generator=generator(5)).tolist()
    for image, result, seed in zip(images, found, seeds, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(library(image), result)
    same = Policy(name)(images[:1].expand(16, -1, -1, -1), generator())  # type: ignore[arg-type]
    assert len({tuple(image.flatten().tolist()) for image in same}) > 3


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_alone_decides_and_other_images_do_not_matter(name: str) -> None:
    images, policy = pixels(), Policy(name)  # type: ignore[arg-type]
    before, state = images.clone(), torch.random.get_rng_state()
    first = policy(images, generator(1))
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(first, policy(images, generator(1)))
    assert not torch.equal(first, policy(images, generator(2)))
    others = pixels(seed=9)
    others[3] = images[3]
    assert torch.equal(policy(others, generator(1))[3], first[3])


def test_the_global_generator_is_put_back_when_a_policy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        torch.rand(1)
        raise RuntimeError("inside torchvision")

    monkeypatch.setattr(v2.TrivialAugmentWide, "forward", fail)
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="inside torchvision"):
        Policy("trivialaugment")(pixels(), generator())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_autoaugment_is_the_policy_of_the_data_set_it_was_learned_on() -> None:
    images = pixels(8)
    found = {name: Policy("autoaugment", name)(images, generator()) for name in ("cifar10", "svhn", "imagenet")}  # type: ignore[arg-type]
    assert not torch.equal(found["cifar10"], found["svhn"])
    assert not torch.equal(found["cifar10"], found["imagenet"])


def test_names_mean_what_they_say() -> None:
    cifar, svhn, mnist, digits = (CATALOGUE[name] for name in ("cifar10", "svhn", "mnist", "digits"))
    usual = (PadCrop(4), Flip())
    assert augmentation("standard", cifar) == standard(cifar) == Augmentation(usual)
    assert augmentation("none", cifar) == NoAugmentation()
    assert augmentation("idbh-weak", cifar) == idbh("weak")
    assert augmentation("idbh-strong", cifar) == idbh("strong")
    assert augmentation("idbh-svhn", svhn) == idbh("svhn")
    assert augmentation("idbh-weak", digits) == Augmentation((CropShift(0, 2), ColorShape(), RandomErasing(0.5)))
    assert augmentation("cutout", cifar) == Augmentation((*usual, Cutout(16)))
    assert augmentation("cutout", mnist) == Augmentation((Cutout(14),))
    for name in NAMES:
        assert augmentation(name, cifar) == Augmentation((*usual, Policy(name)))  # type: ignore[arg-type]
    assert augmentation("autoaugment", svhn) == Augmentation((Policy("autoaugment", "svhn"),))
    assert augmentation("autoaugment", CATALOGUE["tiny_imagenet"]).transforms[-1] == Policy("autoaugment", "imagenet")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("data", CATALOGUE)
def test_every_augmentation_fits_every_data_set(name: str, data: str) -> None:
    info = CATALOGUE[data]
    images = torch.randint(256, (2, *info.shape), dtype=torch.uint8)
    found = augmentation(name, info)(images, generator())
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    assert torch.equal(found, augmentation(name, info)(images, generator()))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown augmentation 'idbh'\. Did you mean .*Known: augmix, auto"):
        augmentation("idbh", CATALOGUE["cifar10"])
    with pytest.raises(UserError, match="unknown policy 'fastaugment'"):
        Policy("fastaugment")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown data set of an AutoAugment policy 'cifar'"):
        Policy("autoaugment", "cifar")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"1 or 3 channels; got \(2, 4, 8, 8\)"):
        Policy("augmix")(torch.rand(2, 4, 8, 8), generator())
    with pytest.raises(UserError, match=r"got torch.int64"):
        Policy("augmix")(torch.zeros(2, 3, 8, 8, dtype=torch.int64), generator())
