"""How wrong is ``kl_divergence`` here? ``python -m stablekl.precision`` says, for torch's rules and for stablekl's.

Needs the packages of the extra: ``pip install stablekl[precision]``. `measure` does the same for a rule of your own.
"""

from .batches import pairs
from .measure import measure
from .references.context import PrecisionError, agreed, mp
from .rows import Row

__all__ = ["PrecisionError", "Row", "agreed", "measure", "mp", "pairs"]
