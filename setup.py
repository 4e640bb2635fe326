"""Builds the kernels in C; everything else is in pyproject.toml, which can't say that an extension is optional."""

import sys

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "stablekl._fused_kernels",
            [f"stablekl/_fused_{name}.c" for name in ("kernels", "gamma", "double", "special")],
            depends=["stablekl/_fused.h"],
            # Comparisons become vector selections if nobody reads the floating-point flags; results do not change.
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
            libraries=[] if sys.platform == "win32" else ["m"],
            optional=True,  # without a C compiler the same formulas are evaluated by torch's operations
        )
    ]
)
