"""What a comparison says beyond its scores and costs: further rates, equal time, full trainings, and what its seeds can show."""

from typing import Any

from normkit.lab.experiment import Table
from normkit.lab.report.wording import listing


def tables(result: dict[str, Any]) -> list[Table]:
    """Scores at equal time, hours of a full training, and verdicts on all recipes together."""
    return []


def remarks(result: dict[str, Any]) -> list[str]:
    """How to read them."""
    return [*_extended(result)]


def _extended(result: dict[str, Any]) -> list[str]:
    more = {recipe["recipe"]: recipe["extended"] for recipe in result["recipes"] if recipe.get("extended")}
    if not more:
        return []
    said = listing([f"{name} ({', '.join(f'{rate:g}' for rate in rates)})" for name, rates in more.items()])
    return [f"The sweep went on beyond the rates given, where the best lay at its edge: {said}."]
