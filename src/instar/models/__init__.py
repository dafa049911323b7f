"""Networks that take images in [0, 1] and return logits: made by name, saved as safetensors with a card."""

from instar.models.decay import parameter_groups
from instar.models.files import load, read_card, save
from instar.models.foreign import LoadReport, load_foreign
from instar.models.registry import Origin, canonical, create, names, origin

__all__ = [
    "LoadReport",
    "Origin",
    "canonical",
    "create",
    "load",
    "load_foreign",
    "names",
    "origin",
    "parameter_groups",
    "read_card",
    "save",
]
