"""How wrong is ``kl_divergence`` here? ``python -m stablekl.precision`` says, for torch's rules and for stablekl's.

Needs the packages of the extra: ``pip install "stablekl[precision]"``. `measure` does the same for a rule of your own.
"""

try:
    from .batches import pairs
    from .measure import measure
    from .references.context import PrecisionError, agreed, mp
    from .rows import Row
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "stablekl":
        raise
    raise ModuleNotFoundError(
        f'stablekl.precision needs the package {error.name}, which is not installed: pip install "stablekl[precision]"',
        name=error.name,
    ) from error

__all__ = ["PrecisionError", "Row", "agreed", "measure", "mp", "pairs"]
