"""A stand-in for the CUDA runtime: it says that there is a GPU, and computes nothing.

Torch's CUDA build asks the runtime which device there is, for streams and for events, even when
every tensor is fake. `build` compiles a shared library that answers; preloaded, its functions are
found before those of the real runtime. No library is loaded here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """What the stand-in says it is: by default an A100."""

    gib: int = 80
    major: int = 8
    minor: int = 0
    processors: int = 108


# Functions that write an answer: their parameters, and the answer. All others only say "success".
ANSWERS = {
    "cudaGetDeviceCount": ("int *count", "*count = 1"),
    "cudaGetDevice": ("int *device", "*device = 0"),
    "cudaDriverGetVersion": ("int *version", "*version = 13000"),
    "cudaRuntimeGetVersion": ("int *version", "*version = 13000"),
    "cudaMemGetInfo": ("size_t *left, size_t *all", "*left = *all = (size_t)GIB << 30"),
    "cudaDeviceGetStreamPriorityRange": ("int *least, int *most", "*least = 0; *most = -5"),
    "cudaDeviceCanAccessPeer": ("int *can", "*can = 0"),
    "cudaDeviceGetPCIBusId": ("char *id", 'strcpy(id, "0000:00:00.0")'),
    "cudaStreamGetPriority": ("void *stream, int *value", "*value = 0"),
    "cudaStreamIsCapturing": ("void *stream, int *yes", "*yes = 0"),
    "cudaStreamGetCaptureInfo": ("void *stream, int *yes", "if (yes) *yes = 0"),
    "cudaDeviceGetAttribute": (
        "int *value, int which",
        "*value = which == cudaDevAttrComputeCapabilityMajor ? MAJOR"
        " : which == cudaDevAttrComputeCapabilityMinor ? MINOR"
        " : which == cudaDevAttrMultiProcessorCount ? PROCESSORS : 0",
    ),
    "cudaGetDeviceProperties": (
        "struct cudaDeviceProp *p",
        "memset(p, 0, sizeof *p); strcpy(p->name, NAME); p->totalGlobalMem = (size_t)GIB << 30;"
        " p->major = MAJOR; p->minor = MINOR; p->multiProcessorCount = PROCESSORS;"
        " p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048",
    ),
    "cudaPointerGetAttributes": ("struct cudaPointerAttributes *p", "memset(p, 0, sizeof *p)"),
    # Handles are never looked into, but must not be null; pinned memory is memory.
    "cudaStreamCreateWithPriority": ("void **stream", "*stream = malloc(64)"),
    "cudaStreamCreateWithFlags": ("void **stream", "*stream = malloc(64)"),
    "cudaEventCreate": ("void **event", "*event = malloc(64)"),
    "cudaEventCreateWithFlags": ("void **event", "*event = malloc(64)"),
    "cudaDeviceGetDefaultMemPool": ("void **pool", "*pool = malloc(64)"),
    "cudaHostAlloc": ("void **at, size_t size", "*at = malloc(size)"),
    "cudaFreeHost": ("void *at", "free(at)"),
    "cudaGetDriverEntryPointByVersion": (
        "const char *name, void **at, unsigned version, unsigned long long flags, int *found",
        "*at = (void *)driver; if (found) *found = 0",
    ),
    # The driver's own, which torch looks up by name.
    "cuInit": ("unsigned flags", ""),
    "cuDriverGetVersion": ("int *version", "*version = 13000"),
    "cuDeviceGetCount": ("int *count", "*count = 1"),
    "cuDevicePrimaryCtxGetState": ("int d, unsigned *flags, int *yes", "*flags = 0; *yes = 1"),
}
# Under this name the driver is looked for; the stand-in goes by it, so it is found there too.
DRIVER = "libcuda.so.1"
LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so")


def torch_folder() -> Path | None:
    """Where torch is installed."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found and found.origin else None


def headers() -> Path | None:
    """The folder with the runtime's structs, which Triton brings along."""
    found = importlib.util.find_spec("triton")
    folder = found and Path(found.origin).parent / "backends" / "nvidia" / "include"
    return folder if folder and (folder / "driver_types.h").is_file() else None


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def why_not() -> str | None:
    """What the simulation lacks on this machine, or nothing."""
    torch = torch_folder()
    if not sys.platform.startswith("linux"):
        return "the GPU simulation needs Linux"
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").is_file():
        return "the GPU simulation needs the CUDA build of torch, and this is another build"
    if headers() is None:
        return "the GPU simulation needs the CUDA headers that triton brings"
    if compiler() is None or shutil.which("nm") is None:
        return "the GPU simulation needs a C compiler and nm (apt-get install gcc)"
    return None


def wanted() -> list[str]:
    """The runtime's functions that torch's libraries look for."""
    files = [torch_folder() / "lib" / name for name in LIBRARIES]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, files)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = (line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.strip())
    return sorted({word for word in words if word.startswith("cuda")})


def source(card: Card) -> str:
    """The stand-in in C."""
    lines = [
        "#include <driver_types.h>",
        "#include <stdlib.h>",
        "#include <string.h>",
        '#define NAME "stand-in GPU"',
        f"#define GIB {card.gib}",
        f"#define MAJOR {card.major}",
        f"#define MINOR {card.minor}",
        f"#define PROCESSORS {card.processors}",
        "static int driver(void) { return 0; }",
    ]
    lines += [f"int {name}({takes}) {{ {does}; return 0; }}"
              for name, (takes, does) in ANSWERS.items()]  # fmt: skip
    lines += [f"int {name}(void) {{ return 0; }}" for name in wanted() if name not in ANSWERS]
    return "\n".join(lines) + "\n"


def build(card: Card) -> Path:
    """Compile the stand-in, once for each card and torch; where it is."""
    text = source(card)
    folder = Path(tempfile.gettempdir()) / f"gpu-simulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        part = target.with_suffix(f".{os.getpid()}.part")
        command = [compiler(), "-shared", "-fPIC", "-w", f"-Wl,-soname,{DRIVER}"]
        command += ["-I", str(headers()), "-x", "c", "-"]
        subprocess.run([*command, "-o", str(part)], input=text, text=True, check=True)
        part.rename(target)
    return target


def environment(card: Card) -> dict[str, str]:
    """The environment of a process in which there is that card."""
    more = {"LD_PRELOAD": str(build(card)), "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}
    return os.environ | more | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
