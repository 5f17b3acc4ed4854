"""How a network is made narrower for a smaller machine: every number of channels by one factor."""

from normkit.core.errors import OptionError


def scaled(channels: int, width: float) -> int:
    """Gives a number of channels times `width`, a factor above 0; rounded, at least 1."""
    if not 0 < width < float("inf"):
        raise OptionError(f"width is {width}; wanted a factor above 0, such as 0.5")
    return max(1, round(channels * width))
