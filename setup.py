"""The C kernels; everything else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

NATIVE = "src/vattention/native"

setup(
    ext_modules=[
        Extension(
            "vattention.native._kernels",
            sources=sorted(glob(f"{NATIVE}/*.c")),
            depends=sorted(glob(f"{NATIVE}/*.h")),
            extra_compile_args=["-O3", "-g0", "-Wno-psabi"],
            # Without a C compiler the package installs and computes the same, only slower.
            optional=True,
        )
    ]
)
