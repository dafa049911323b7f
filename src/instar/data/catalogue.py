"""What is known about each data set before a single file is read: sizes, classes, usual threat model, terms of use."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from instar.errors import UserError, unknown


@dataclass(frozen=True)
class DatasetInfo:
    """One data set as a value: what a model, an attack and a report need to know about it.

    Attributes:
        name: What a user types, for example ``"cifar10"``.
        title: What a report prints, for example ``"CIFAR-10"``.
        classes: Readable class names; the label is the position.
        shape: One image as (C, H, W).
        train_size: Images in the training set.
        test_size: Images in the test set.
        eps: Usual radius of the perturbation in the unit of inputs in [0, 1].
        step_size: Usual step of PGD in the same unit.
        steps: Usual number of PGD steps.
        norm: Norm of the perturbation: ``"Linf"``, ``"L2"`` or ``"L1"``.
        mean: Mean of each channel over the training set, in [0, 1], for the model's first layer.
        std: Standard deviation of each channel, in [0, 1].
        flip: Whether a mirrored image still shows its class, so that `Flip` belongs to the usual augmentation.
        padding: Pixels of zero padding of the usual random crop; 0 means no crop.
        source: Where the data come from, and which paper the threat model follows.
        license: Terms of use, in a few words.

    Raises:
        UserError: fewer than two classes, sizes or shape not positive, eps or step_size not in (0, 1] for Linf,
            or mean and std that do not fit the channels.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> cifar = CATALOGUE["cifar10"]
        >>> cifar.shape, len(cifar.classes), round(cifar.eps * 255)
        ((3, 32, 32), 10, 8)
    """

    name: str
    title: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train_size: int
    test_size: int
    eps: float
    step_size: float
    steps: int
    norm: str = "Linf"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    flip: bool = False
    padding: int = 0
    source: str = ""
    license: str = "not known"

    def __post_init__(self) -> None:
        """Check that the numbers can belong to images in [0, 1]."""
        if len(self.classes) < 2:
            raise UserError(f"{self.name}: a classification problem needs at least 2 classes; got {self.classes}")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UserError(f"{self.name}: shape must be (channels, height, width), all positive; got {self.shape}")
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0] or min(self.std) <= 0:
            raise UserError(
                f"{self.name}: mean and std need one number for each of {self.shape[0]} channels, std positive; "
                f"got mean {self.mean}, std {self.std}"
            )
        if self.norm == "Linf" and not (0 < self.eps <= 1 and 0 < self.step_size <= 1):
            raise UserError(
                f"{self.name}: eps and step_size must be in (0, 1] because inputs lie in [0, 1]; got {self.eps} and "
                f"{self.step_size}. Did you mean {self.eps:g}/255?"
            )

    def size(self, split: str) -> int:
        """Number of images of the split ``"train"`` or ``"test"``.

        Example:
            >>> CATALOGUE["mnist"].size("test")
            10000
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return self.train_size if split == "train" else self.test_size


SPLITS = ("train", "test")

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# fmt: off
CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
# fmt: on

# WordNet id → the name that fast.ai gives the class; the order of the ids is the order of the labels.
IMAGENETTE_NAMES = MappingProxyType(
    {
        "n01440764": "tench",
        "n02102040": "English springer",
        "n02979186": "cassette player",
        "n03000684": "chain saw",
        "n03028079": "church",
        "n03394916": "French horn",
        "n03417042": "garbage truck",
        "n03425413": "gas pump",
        "n03445777": "golf ball",
        "n03888257": "parachute",
    }
)

# The conventional statistics of ImageNet: what pretrained models expect, and close enough for any colour photographs.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_CIFAR_TERMS = "none stated by its authors; cite Krizhevsky (2009)"

CATALOGUE = MappingProxyType(
    {
        info.name: info
        for info in (
            DatasetInfo(
                name="digits",
                title="Digits (8×8)",
                classes=DIGIT_NAMES,
                shape=(1, 8, 8),
                train_size=1437,
                test_size=360,
                # At 0.2 (3.2 of 16 grey levels) a small CNN trained without an adversary keeps about 20 % of its test
                # accuracy under PGD-50, one trained with PGD-10 about 74 %: a problem that is real, and can be solved.
                eps=0.2,
                step_size=0.05,
                steps=10,
                mean=(0.3054,),
                std=(0.3760,),
                source="scikit-learn's load_digits: the test part of UCI optdigits, values 0..16 divided by 16. The "
                "split into train and test is ours, fixed and stratified; writers occur in both parts",
                license="CC BY 4.0 (UCI Machine Learning Repository)",
            ),
            DatasetInfo(
                name="mnist",
                title="MNIST",
                classes=DIGIT_NAMES,
                shape=(1, 28, 28),
                train_size=60_000,
                test_size=10_000,
                eps=0.3,
                step_size=0.01,
                steps=40,
                mean=(0.13066048,),
                std=(0.30810781,),
                source="LeCun, Cortes and Burges; threat model of Madry et al. (2018), section 5: 40 steps of 0.01, "
                "no augmentation",
                license="CC BY-SA 3.0",
            ),
            DatasetInfo(
                name="cifar10",
                title="CIFAR-10",
                classes=CIFAR10_NAMES,
                shape=(3, 32, 32),
                train_size=50_000,
                test_size=10_000,
                eps=8 / 255,
                step_size=2 / 255,
                steps=10,
                mean=(0.49139968, 0.48215841, 0.44653091),
                std=(0.24703223, 0.24348513, 0.26158784),
                flip=True,
                padding=4,
                source="Krizhevsky (2009); threat model of Madry et al. (2018) with 10 steps, as Rice et al. (2020)",
                license=_CIFAR_TERMS,
            ),
            DatasetInfo(
                name="cifar100",
                title="CIFAR-100",
                classes=CIFAR100_NAMES,
                shape=(3, 32, 32),
                train_size=50_000,
                test_size=10_000,
                eps=8 / 255,
                step_size=2 / 255,
                steps=10,
                mean=(0.50707516, 0.48654887, 0.44091784),
                std=(0.26733429, 0.25643846, 0.27615047),
                flip=True,
                padding=4,
                source="Krizhevsky (2009), fine labels; threat model as for CIFAR-10",
                license=_CIFAR_TERMS,
            ),
            DatasetInfo(
                name="svhn",
                title="SVHN",
                classes=DIGIT_NAMES,
                shape=(3, 32, 32),
                train_size=73_257,
                test_size=26_032,
                eps=8 / 255,
                step_size=1 / 255,
                steps=10,
                mean=(0.4376821, 0.4437697, 0.47280442),
                std=(0.19803012, 0.20101562, 0.19703614),
                source="Netzer et al. (2011), cropped digits without the extra set; step of Rice et al. (2020) and "
                "AWP, no augmentation as in most code",
                license="non-commercial use only",
            ),
            DatasetInfo(
                name="tiny_imagenet",
                title="Tiny-ImageNet",
                # The readable names come from words.txt of the data set itself; `info` and `load` fill them in.
                classes=tuple(f"class {label}" for label in range(200)),
                shape=(3, 64, 64),
                train_size=100_000,
                test_size=10_000,
                eps=8 / 255,
                step_size=2 / 255,
                steps=10,
                mean=(0.4802, 0.4481, 0.3975),
                std=(0.2770, 0.2691, 0.2821),
                flip=True,
                padding=4,
                source="Stanford CS231n; the official val folder is the test split, labels in the order of the sorted "
                "WordNet ids; threat model as for CIFAR-10",
                license="ImageNet terms: research, non-commercial",
            ),
            DatasetInfo(
                name="imagenette",
                title="Imagenette at 128",
                classes=tuple(IMAGENETTE_NAMES.values()),
                shape=(3, 128, 128),
                train_size=9_469,
                test_size=3_925,
                eps=8 / 255,
                step_size=2 / 255,
                steps=10,
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
                flip=True,
                padding=16,
                source="Imagenette 2 (fast.ai), the official val folder is the test split, at any size; there is no "
                "canonical threat model, so state size and eps with every number. Mean and std are ImageNet's",
                license="images: ImageNet terms (research, non-commercial)",
            ),
        )
    }
)
