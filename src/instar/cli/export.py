"""``instar export RUN --format FORMAT --out PATH``."""

from __future__ import annotations

from collections.abc import Sequence

from instar.cli.arguments import parse, parser, pointed
from instar.errors import UserError, unknown
from instar.models.export import FORMATS, export

DESCRIPTION = """Write a trained network for use elsewhere, with its normalisation and logit scale inside.

TARGET is a run's folder or weights of ours. Formats: safetensors (tensors and a JSON card), state_dict (a .pt file of
plain tensors), onnx (any batch size, compared with the network by onnxruntime), hub (a folder with weights, config and
a model card that holds the protocol of every recorded number). `instar evaluate` reads each of them back."""


def run(words: Sequence[str]) -> int:
    """Export and print what was written.

    Raises:
        UserError: A mistake in the arguments, or a network that cannot be exported.
    """
    made = parser("export", DESCRIPTION)
    made.add_argument("--target", type=str, default=None, help="run or weights, if no word stands for it")
    made.add_argument("--format", type=str, default="safetensors", help=f"one of {', '.join(FORMATS)}")
    made.add_argument("--out", type=str, default=None, help="file to write, or folder for the hub")
    made.add_argument("--checkpoint", type=str, default="best", help="of a run: best, last or epoch_NNN")
    made.add_argument("--model", type=str, default=None, help="network of your own code, as module:function")
    given = parse(made, pointed(made, words))
    if not given.target:
        raise UserError("export what? instar export RUN --format FORMAT --out PATH")
    if given.format not in FORMATS:
        raise unknown("format", given.format, FORMATS)
    if not given.out:
        raise UserError(f"export into which file or folder? give --out, for example --out net{FORMATS[given.format]}")
    done = export(given.target, given.out, format=given.format, checkpoint=given.checkpoint, model=given.model)
    for path in done.files:
        print(path)
    if done.note:
        print(done.note)
    print(f"check: instar evaluate {done.path}{' --suite black_box' if given.format == 'onnx' else ''}")
    return 0
