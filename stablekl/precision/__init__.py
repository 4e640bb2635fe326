"""How wrong is ``kl_divergence`` here? ``python -m stablekl.precision`` says, for torch's rules and for stablekl's.

Needs the packages of the extra: ``pip install "stablekl[precision]"``. `measure` does the same for a rule of your own.
"""

from importlib.util import find_spec

if _missing := [name for name in ("mpmath", "hypothesis", "rich", "matplotlib") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f'stablekl.precision needs {", ".join(_missing)}, not installed here: pip install "stablekl[precision]"',
        name=_missing[0],
    )

from .batches import pairs
from .measure import measure
from .references.context import PrecisionError, agreed, mp
from .rows import Row

__all__ = ["PrecisionError", "Row", "agreed", "measure", "mp", "pairs"]
