"""Print the requirements of the given wheels, except for each other and PyTorch, for `pip download`.

python tools/offline_requirements.py 3.12 constraints.txt FOLDER/*.whl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

# A cluster's own PyTorch fits its driver and its network, and a bundled PyTorch would take gigabytes.
GIVEN = ("torch",)


def missing(python: str, constraints: Path, wheels: Sequence[Path]) -> list[str]:
    """Return the direct dependencies of `wheels` that are not among them, with their pinned versions.

    Args:
        python: version of the Python that will install them, such as 3.12; markers are evaluated for it.
        constraints: a pip constraints file.
        wheels: wheel files to be installed.
    """
    pins = {
        canonicalize_name(pin.name): pin for pin in _that_hold(constraints.read_text().splitlines(), python)
    }
    present = {*GIVEN, *(parse_wheel_filename(wheel.name)[0] for wheel in wheels)}
    found = set()
    for wheel in wheels:
        for needed in _that_hold(_dependencies(wheel), python):
            name = canonicalize_name(needed.name)
            if name not in present:
                found.add(f"{name}{(pins[name].specifier if name in pins else needed.specifier)}")
    return sorted(found)


def _dependencies(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return metadata.get_all("Requires-Dist") or []


def _that_hold(lines: Sequence[str], python: str) -> Iterator[Requirement]:
    """Yield the requirements among `lines` whose markers hold for `python` on Linux, without extras."""
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    for line in lines:
        text = line.partition("#")[0].strip()
        if text and ((needed := Requirement(text)).marker is None or needed.marker.evaluate(target)):
            yield needed


if __name__ == "__main__":
    python, constraints, *wheels = sys.argv[1:]
    print("\n".join(missing(python, Path(constraints), [Path(wheel) for wheel in wheels])))
