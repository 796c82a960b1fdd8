"""Make requirements.hashes.txt: the wheels that requirements.lock pins, with their SHA-256.

    uv pip compile requirements.txt -c requirements.lock --universal --python-version 3.11 \\
      --only-binary :all: --format pylock.toml -q -o pylock.toml
    python tests/lock_hashes.py <pylock.toml >requirements.hashes.txt

For Linux on x86-64 and Python 3.11 to 3.13. torch and what it brings (triton, CUDA) are left out: a
PyTorch image has a build of its own.
"""

import re
import sys
import tomllib

from packaging.markers import Marker, default_environment
from packaging.utils import parse_wheel_filename

PYTHONS = {"3.11": "3.11.9", "3.12": "3.12.7", "3.13": "3.13.0"}
LINUX = {
    "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
    "os_name": "posix", "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}  # fmt: skip
TORCH = re.compile(r"(torch|triton|(nvidia|cuda)-.*)$")


def wanted(marker: str) -> list[bool]:
    """Whether a package is needed, for each Python."""
    versions = ({"python_version": short, "python_full_version": full}
                for short, full in PYTHONS.items())  # fmt: skip
    return [Marker(marker).evaluate(default_environment() | LINUX | v) for v in versions]


def fits(name: str) -> bool:
    """Whether a wheel runs on Linux x86-64 with glibc, on one of the Pythons."""
    for tag in parse_wheel_filename(name)[3]:
        place = tag.platform == "any" or re.match(r"(manylinux.*|linux)_x86_64$", tag.platform)
        minor = re.fullmatch(r"(?:cp|py)3(\d+)", tag.interpreter)
        python = tag.interpreter in ("py3", "py2") or (
            minor and (int(minor[1]) in (11, 12, 13) or (tag.abi == "abi3" and int(minor[1]) < 13))
        )
        if place and python and not (tag.abi.endswith("t") and tag.abi != "abi3"):
            return True
    return False


def main() -> None:
    print("# The wheels of requirements.lock for Linux x86-64, Python 3.11 to 3.13, without torch.")
    print("# scripts/setup.sh installs them with --require-hashes. Made by tests/lock_hashes.py.")
    for package in tomllib.load(sys.stdin.buffer)["packages"]:
        marker = package.get("marker", "")
        needed = wanted(marker) if marker else [True]
        if TORCH.match(package["name"]) or not any(needed):
            continue
        wheels = [w for w in package["wheels"] if fits(w["url"].rsplit("/", 1)[1])]
        if not wheels:
            sys.exit(f"{package['name']}: no wheel for Linux x86-64")
        line = f"{package['name']}=={package['version']}"
        line += "" if all(needed) else f" ; {marker}"
        hashes = sorted({w["hashes"]["sha256"] for w in wheels})
        print(" \\\n".join([line, *(f"    --hash=sha256:{h}" for h in hashes)]))


if __name__ == "__main__":
    main()
