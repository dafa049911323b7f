"""Models by name: spellings, timm, user code, and what a mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from instar.errors import UserError
from instar.models.precision import FloatStemConv2d
from instar.models.registry import Normalized, canonical, create, names, origin

USER_CODE = """
import torch
from torch import nn

def plain(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))

def normalising(classes, mean, std, hidden=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, hidden), nn.Linear(hidden, classes))

def ten_whatever_is_asked(**anything):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

def with_batch_norm(classes):
    frozen = nn.BatchNorm2d(3).eval()
    return nn.Sequential(nn.BatchNorm2d(3), frozen, nn.Flatten(), nn.Linear(192, classes))

def not_a_module(classes):
    return 5

def fails(classes):
    raise RuntimeError("no luck\\nat all")
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "code_of_a_user.py").write_text(USER_CODE)
    (tmp_path / "broken_code_of_a_user.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "code_of_a_user"


@pytest.mark.parametrize("name", names())
def test_every_listed_name_is_its_own_canonical_name(name: str) -> None:
    assert canonical(name) == name


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("WideResNet-28-10", "wide_resnet_28_10"),
        ("wrn_28_10", "wide_resnet_28_10"),
        ("WRN-34-20", "wide_resnet_34_20"),
        ("ResNet-18", "resnet18"),
        ("preactresnet18", "preact_resnet18"),
        ("small-cnn", "small_cnn"),
    ],
)
def test_usual_spellings_are_understood(spelling: str, expected: str) -> None:
    assert canonical(spelling) == expected


def test_arguments_of_a_model_make_it_again() -> None:
    model = create("WRN-10-1", classes=7, channels=1, image_size=28, mean=(0.5,), std=(0.3,), head="cosine", seed=1)
    made = origin(model)
    assert made is not None
    again = create(made.architecture, **made.arguments)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert torch.equal(again.normalize.mean, model.normalize.mean)
    assert origin(again) == made
    assert origin(nn.Linear(1, 1)) is None


def test_seed_fixes_the_weights_and_leaves_the_generator_as_found() -> None:
    before = torch.get_rng_state()
    first, second = (create("small_cnn", classes=10, width=4, seed=5).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = create("small_cnn", classes=10, width=4, seed=6).state_dict()
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet81", {}, "Did you mean 'resnet18'"),
        ("resnet18", {"width": 0}, "width must be a whole number from 1"),
        ("resnet18", {"width": True}, "width must be a whole number"),
        ("resnet18", {"width": 16.5}, "width must be a whole number"),
        ("resnet18", {"width": 10**9}, "width must be a whole number"),
        ("resnet18", {"classes": 1}, "classes must be a whole number from 2"),
        ("resnet18", {"channels": 0}, "channels must be a whole number"),
        ("resnet18", {"widht": 4}, "unknown argument of resnet18 'widht'"),
        ("timm/convnext_ato", {}, "Did you mean 'timm/convnext_atto'"),
        ("timm/hf-hub:someone/something", {}, "unknown timm model"),
        ("timm/convnext_atto", {"width": 4}, "width in the name"),
        ("timm/convnext_atto", {"checkpoint_path": "a.pt"}, "may run code"),
        ("timm/convnext_atto", {"num_classes": 3}, "give classes instead"),
        ("timm/convnext_atto", {"nonsense": 3}, "refused its arguments"),
        ("timm/convnext_atto", {"image_size": 8}, "cannot process images of shape (3, 8, 8)"),
        ("no_such_module_here:net", {}, "cannot import 'no_such_module_here'"),
    ],
)
def test_mistake_is_one_clear_line(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create(name, **{"classes": 10, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_timm_model_has_normalisation_features_and_head() -> None:
    model = create("timm/convnext_atto", classes=7, mean=[0.4] * 3, std=[0.25] * 3, seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.net((x - 0.4) / 0.25)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.head(model.features(x)), expected)
    assert isinstance(model.net.stem[0], FloatStemConv2d)


def test_timm_transformer_is_made_for_the_size_of_the_images() -> None:
    model = create("timm/vit_tiny_patch16_224", classes=7, image_size=64, depth=1, embed_dim=24, num_heads=2).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_torchvision_function_is_called_with_its_number_of_classes() -> None:
    model = create("torchvision.models:squeezenet1_1", classes=7, image_size=64).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_user_function_gets_the_arguments_it_accepts(user_code: str) -> None:
    plain = create(f"{user_code}:plain", classes=4, channels=3, image_size=8)
    assert isinstance(plain, nn.Sequential)
    wrapped = create(f"{user_code}:plain", classes=4, image_size=8, mean=[0.5] * 3, std=[0.5] * 3, seed=0)
    assert isinstance(wrapped, Normalized)
    own = create(f"{user_code}:normalising", classes=4, image_size=8, mean=[0.5] * 3, std=[0.5] * 3, hidden=5)
    assert own[1].out_features == 5
    assert origin(own).arguments["hidden"] == 5


def test_checking_a_user_model_leaves_its_modes_and_buffers_as_made(user_code: str) -> None:
    model = create(f"{user_code}:with_batch_norm", classes=4, image_size=8)
    assert [module.training for module in model] == [True, False, True, True]
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_var, torch.ones(3))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("plane", {}, "Did you mean 'plain'"),
        ("plain", {"depth": 3}, "unknown argument of code_of_a_user:plain 'depth'"),
        ("plain", {"width": 3}, "takes no width"),
        ("plain", {"image_size": 16}, "cannot process images of shape (3, 16, 16)"),
        ("ten_whatever_is_asked", {}, "must return logits of shape (1, 4) for one image; got (1, 10)"),
        ("not_a_module", {}, "must return a torch.nn.Module; got int"),
        ("fails", {}, "RuntimeError: no luck at all"),
    ],
)
def test_mistake_in_user_code_is_one_clear_line(
    user_code: str, function: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        create(f"{user_code}:{function}", **{"classes": 4, "image_size": 8, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_failing_import_of_user_code_names_the_cause(user_code: str) -> None:
    with pytest.raises(UserError, match="no_such_package_anywhere"):
        create("broken_code_of_a_user:net", classes=4)
