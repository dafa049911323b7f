"""Write constraints.txt from the report of `pip install --dry-run`; `make lock` calls it."""

import json
import re
import sys
from pathlib import Path

HEADER = """\
# Exact versions of everything that `make` installs, resolved on Python {python} for Linux and valid for every supported
# Python. On other systems the nvidia-*, cuda-* and triton lines simply find nothing to constrain.
# Written by `make lock`; do not edit by hand.
"""


def main() -> None:
    """Read the report named first and write the constraints named second."""
    report = json.loads(Path(sys.argv[1]).read_text())
    versions = {}
    for package in report["install"]:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        if name != "instar":
            # Without the local label: 2.15.0 also admits the CPU build 2.15.0+cpu.
            versions[name] = package["metadata"]["version"].partition("+")[0]
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    python = ".".join(report["environment"]["python_full_version"].split(".")[:2])
    Path(sys.argv[2]).write_text(HEADER.format(python=python) + "".join(lines))


main()
