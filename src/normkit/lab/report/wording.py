"""How the report says numbers and what it concludes from them, the same in the terminal and on the page."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from normkit.catalogue.entry import entries
from normkit.lab import stats as judging
from normkit.lab.say import counted
from normkit.surgery.target import OVER_POSITIONS

ABSENT = judging.ABSENT
MINUS = "\u2212"
TIMES = "\u00d7"
LARGE = 1e5  # R² of a training that nearly diverged has no lower end
# One over the unit of single precision: a larger condition number is rounding, and the weight as good as singular.
RESOLVED = 2.0**23


def finite(value: Any) -> float | None:
    """A finite number, or None for null, NaN and infinity, which a diverged run may log."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def at(result: Any, path: str) -> Any:
    """The value at a dotted path, or None where the record has null on the way or lacks the last step."""
    for step in path.split("."):
        result = result.get(step) if isinstance(result, dict) else None
    return result


class Number(str):
    """A number as it is shown, with the value behind it, which the page tells where one points at it."""

    __slots__ = ("value",)
    value: float

    def __new__(cls, text: str, value: float) -> "Number":
        made = super().__new__(cls, text)
        made.value = value
        return made


def number(value: Any, kind: str) -> str:
    """A number of a record as the report prints it."""
    known = finite(value)
    if known is None:
        return ABSENT
    text = FORMS.get(kind, significant)(known)
    return Number(text.replace("-", MINUS, 1) if text.startswith("-") else text, known)


def significant(value: float) -> str:
    """Three significant digits without an exponent where they fit, two with one above 10 000."""
    size = abs(value)
    if size >= 9999.5 or 0 < size < 0.001:
        return f"{value:.1e}"
    places = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{places}f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


FORMS: dict[str, Callable[[float], str]] = {
    "score": lambda value: f"{value:.4f}" if abs(value) < LARGE else f"{value:.2e}",
    "difference": lambda value: (
        (f"{value:+.4f}" if abs(value) < LARGE else f"{value:+.2e}") if round(value, 4) else "0.0000"
    ),
    "count": "{:,.0f}".format,
    "ratio": f"{{:.2f}}{TIMES}".format,
    "seconds": duration,
    "condition": lambda value: f">{RESOLVED:.0e}" if value > RESOLVED else significant(value),
    "rate": "{:g}".format,
}


def score_name(result: dict[str, Any]) -> str:
    """The name of the score as read in a sentence."""
    name = str(at(result, "task.score") or "score")
    return {"r2": "R²"}.get(name, name)


def level(paired: Any) -> str:
    """The level of an interval in percent."""
    return f"{100 * (finite(at(paired, 'level')) or 0.95):g}%"


def listing(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def over_seeds(recipe: dict[str, Any], key: str) -> tuple[float | None, int]:
    """The median over the runs that have a value, and how many have."""
    known = [value for value in (finite(run.get(key)) for run in recipe["runs"]) if value is not None]
    return (median(known) if known else None), len(known)


def kept(recipe: dict[str, Any]) -> int:
    """How many seeds of a recipe gave a test score."""
    return int(at(recipe, "test_score.n") or 0)


def judge(recipe: dict[str, Any], baseline: str) -> str:
    """baseline, better, worse, even (nothing shown), single (no interval), part (seeds were lost) or failed (all were)."""
    low, high = finite(at(recipe, "paired.low")), finite(at(recipe, "paired.high"))
    if kept(recipe) == 0:
        return "failed"
    if recipe["recipe"] == baseline:
        return "baseline"
    if 0 < int(at(recipe, "paired.n") or 0) < len(recipe["runs"]):
        return "part"  # the seeds that are left were chosen by how they fared
    if low is None or high is None:
        return "single" if at(recipe, "paired.mean") is not None else "failed"
    shown = judging.judge(low, high)
    return "even" if shown == judging.EVEN else shown


def alike(recipe: dict[str, Any]) -> bool:
    """Whether all seeds differ from the baseline by the same."""
    # Scores come in whole samples, so a few seeds can agree to the last digit by chance: no spread to judge by.
    low, high = finite(at(recipe, "paired.low")), finite(at(recipe, "paired.high"))
    return low is not None and low == high


def at_edge(recipe: dict[str, Any], result: dict[str, Any]) -> str:
    """The recipe whose learning rate, at the edge of its sweep, may be why this one was judged better or worse; or nothing."""
    word = judge(recipe, result["baseline"])
    which = {"better": baseline_of(result), "worse": recipe}.get(word)
    return which["recipe"] if which and which.get("rate_at_edge") else ""


def verdict(recipe: dict[str, Any], result: dict[str, Any]) -> str:
    """The judgement in plain words."""
    pairs, word = int(at(recipe, "paired.n") or 0), judge(recipe, result["baseline"])
    if edge := at_edge(recipe, result):
        return f"{word}, but {edge}'s\nlearning rate is\nat the edge†"
    return {
        "baseline": "the baseline",
        "better": "better",
        "worse": "worse",
        "even": f"no difference shown\nat {counted(pairs, 'seed')}",
        "single": "one seed: no interval",
        "part": f"{pairs} of {counted(len(recipe['runs']), 'seed')},\nnot judged",
        "failed": "diverged" if kept(recipe) == 0 else "nothing to pair with",
    }[word]


def baseline_of(result: dict[str, Any]) -> dict[str, Any]:
    """The baseline's entry."""
    return next(recipe for recipe in result["recipes"] if recipe["recipe"] == result["baseline"])


def ms_per_step(recipe: dict[str, Any], result: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Milliseconds per step and their interval: the baseline's median times the recipe's ratio, so that both say the same."""
    base = finite(at(baseline_of(result), "cost.ms_per_step"))
    ratio, ends = finite(at(recipe, "cost.ratio")), at(recipe, "cost.ratio_interval") or (None, None)
    if base is None or ratio is None:
        return finite(at(recipe, "cost.ms_per_step")), None, None
    low, high = (None if end is None else base * end for end in ends)
    return base * ratio, low, high


def ratio(recipe: dict[str, Any]) -> str:
    """Time per step relative to the baseline's, with its interval."""
    text, ends = number(at(recipe, "cost.ratio"), "ratio"), at(recipe, "cost.ratio_interval")
    return f"{text} [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else text


def words(recipes: Iterable[str]) -> list[str]:
    """Every word of these recipes in full, with its paper."""
    known = {
        entry.word: f"{entry.title[0].lower()}{entry.title[1:]} ({entry.citation.partition(',')[0]})"
        for entry in entries()
    }
    known |= {"keep": "the norms stay as they are", "none": "the norms are removed"}
    terms = [re.split(r"[:@]", term)[0].strip() for recipe in recipes for term in recipe.split("+")]
    return [f"{term}: {known[term]}" for term in dict.fromkeys(terms) if term and term in known]


def changed(rows: Iterable[str]) -> str:
    """What was changed, kind by kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        name, _, rest = row.partition(": ")
        kind, _, mode = rest.rpartition(" -> ")[2].partition("(")[0].strip().replace("_", " ").partition(":")
        kinds[f"{kind} ({mode})" if mode else kind].append(name)
    lines = []
    for kind, names in kinds.items():
        shown = names if len(names) < 4 else (names[0], "...", names[-1])
        lines.append(f"{kind} on {counted(len(names), 'layer')}: {', '.join(shown)}")
    return "\n".join(lines)


def layer_names(result: dict[str, Any]) -> dict[str, str]:
    """What condition numbers are of, by their key: the layer's own name where all recipes have the same."""
    said = {}
    for place in ("first", "last"):
        names = {str(at(recipe, f"condition.{place}.name") or "") for recipe in result["recipes"]} - {""}
        said[place] = f"{names.pop()} ({place})" if len(names) == 1 else f"{place} layer"
    return {**said, "mean": "mean over layers"}


def interval(paired: Any) -> str:
    """The paired difference's interval."""
    return f"{number(at(paired, 'low'), 'difference')} to {number(at(paired, 'high'), 'difference')}"


def findings(result: dict[str, Any]) -> list[str]:
    """What was found: who is best, by how much, how sure; then what the others showed."""
    baseline, name = result["baseline"], score_name(result)
    scored = [recipe for recipe in result["recipes"] if finite(at(recipe, "test_score.mean")) is not None]
    if not scored:
        return ["No recipe gave a test score: every run diverged. Try smaller learning rates."]
    top = max(scored, key=lambda recipe: recipe["test_score"]["mean"])
    lead = f"{top['recipe']} has the highest mean test {name}, {number(top['test_score']['mean'], 'score')}"
    tied = [r["recipe"] for r in scored if r["test_score"]["mean"] == top["test_score"]["mean"]]
    if len(tied) > 1:
        lead = f"{listing(tied)} share the highest mean test {name}, {number(top['test_score']['mean'], 'score')}"
    lead += f" ({counted(kept(top), 'seed')})"
    judged = {recipe["recipe"]: judge(recipe, baseline) for recipe in result["recipes"]}
    edges = {recipe["recipe"]: at_edge(recipe, result) for recipe in result["recipes"]}
    sentences = [lead_sentence(lead, top, judged, baseline, tied, edges[top["recipe"]])]
    others = {recipe: word for recipe, word in judged.items() if recipe not in (top["recipe"], baseline)}
    for word, phrase in {
        "better": f"better than {baseline}",
        "worse": f"worse than {baseline}",
        "even": f"not shown to differ from {baseline} at this number of seeds",
    }.items():
        names = [recipe for recipe, got in others.items() if got == word]
        if names:
            doubt = [name for name in names if edges[name]]
            tail = f", but see † for {listing(doubt)}" if doubt else ""
            sentences.append(f"{listing(names)} {'is' if len(names) == 1 else 'are'} {phrase}{tail}.")
    return sentences


def lead_sentence(
    lead: str, top: dict[str, Any], judged: dict[str, str], baseline: str, tied: list[str], edge: str
) -> str:
    """Who is best, and what the interval allows to say about it."""
    word = judged[top["recipe"]]
    if "single" in judged.values() and word in ("baseline", "single"):
        return f"{lead}. With one seed there is no interval, so this may be chance: take 3 seeds or more."
    if word == "baseline" or (baseline in tied and word == "even"):
        return f"{lead}: no recipe was shown to be better than the baseline {baseline}."
    if word == "part":
        return f"{lead}; other seeds diverged, of it or of the baseline {baseline}: not judged."
    if word not in ("better", "even"):
        return f"{lead}; there is no baseline score to compare it with."
    by = f"{number(top['paired']['mean'], 'score')} above the baseline {baseline}"
    bounds = f"{level(top['paired'])} interval {interval(top['paired'])}"
    if edge:
        return f"{lead}, {by} ({bounds}): {word}, but {edge}'s learning rate is at the edge of its sweep (†): it may do better."
    if word == "better":
        return f"{lead}, {by} ({bounds}): better, as far as these seeds tell."
    if alike(top):
        return f"{lead}, {by}, but all seeds agree, which leaves no spread to judge by: no difference shown."
    return f"{lead}, {by}, but the {bounds} includes zero: no difference shown."


def cautions(result: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the table: lost runs, learning rates at the edge, many intervals."""
    notes = []
    for recipe in result["recipes"]:
        lost = sum(run["status"] != "ok" for run in recipe["runs"])
        if lost:
            rest = f"its numbers are of the other {kept(recipe)}" if kept(recipe) else "it has no numbers"
            notes.append(f"{recipe['recipe']} diverged in {lost} of {counted(len(recipe['runs']), 'seed')}; {rest}.")
    agreeing = [r["recipe"] for r in result["recipes"] if r["recipe"] != result["baseline"] and alike(r)]
    if agreeing:
        notes.append(
            f"{listing(agreeing)}: all seeds agree on the difference from {result['baseline']}, so that there is no spread to "
            "judge by; take more seeds."
        )
    edge = [r["recipe"] for r in result["recipes"] if r.get("rate_at_edge")]
    if edge:
        notes.append(
            f"† {listing(edge)}: the chosen learning rate is at the edge of the sweep, a better one may lie beyond; "
            "widen it with --rates."
        )
    ends = {
        r["recipe"]: [(at(r, f"condition.{place}.effective") or [None])[-1] for place in ("first", "last")]
        for r in result["recipes"]
    }
    beyond = [recipe for recipe, values in ends.items() if any((finite(value) or 0) > RESOLVED for value in values)]
    if beyond:
        notes.append(
            f"{listing(beyond)}: a condition number above {RESOLVED:.0e} is more than single precision resolves; the weight "
            "is as good as singular."
        )
    leaking = [r["recipe"] for r in result["recipes"] if any(OVER_POSITIONS in row for row in r.get("changes") or ())]
    if leaking:
        notes.append(f"{listing(leaking)}: {OVER_POSITIONS}.")
    compared = [r for r in result["recipes"] if judge(r, result["baseline"]) in ("better", "worse", "even")]
    if len(compared) > 1:
        share = 1 - (finite(at(compared[0], "paired.level")) or 0.95)
        notes.append(
            f"Each interval stands alone: of {len(compared)}, the chance that one or more misses is up to "
            f"{100 * min(1.0, share * len(compared)):.0f}%."
        )
    return notes
