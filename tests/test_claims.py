"""Experiments: each runs whole at a tiny size and resumes exactly, and what it says follows from its runs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from interruption import Stop, at_call
from normkit.catalogue.methods import method
from normkit.lab.experiment import Bench
from normkit.lab.experiments import (
    FILES,
    batch_size,
    blog_table,
    conditioning,
    cost_activations,
    disparity,
    equilibrate,
    find_experiment,
    four_benefits,
    four_improvements,
    gan,
    gradnorm,
    linear_part,
    names,
    pre_post_ln,
    small_table,
    why_bn,
)
from normkit.lab.fields.occupancy import learn_solid
from normkit.lab.fields.radiance import learn_scene
from normkit.lab.jobs import adversarial, encoders
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.perform import perform
from normkit.lab.train import learning, walk
from normkit.surgery.recipe import apply_recipe
from test_fields import on_a_torus, on_balls

IMAGES: dict[str, Any] = {"data": "digits", "train": 64, "halve": False, "width": 4}
DIGITS = {**IMAGES, "test": 64, "epochs": 1}
ENCODER = {"depth": 1, "features": 8, "length": 6, "steps": 6}

# What each page must say at the tiny scale, besides tables, figures and remarks.
SAID = {
    "table1": ("the same training: after 11 steps every loss and every weight is equal", "(printed -0.2)"),
    "table3": ("is not reproduced", "All forms run"),
    "table4": ("| mean of the above | 30.2 | 29.7 | 0.505 |", "hinder", "paper prints nothing of this scene"),
    "shape": ("torus, Gaussian: IoU", "analytic shapes (torus, gyroid)", "width 8, 400 points, 100 per step"),
    "cost": ("2 % of BN", "folded, inference takes within"),
    "conditioning": ("with E on all layers (plain): lower condition numbers at the end in", "E, temperature"),
    "vit-s": ("So without LN they are",),
    "equilibrate": ("frozen at 1 is E: of the training losses of each epoch, they are equal to the last bit",),
}
SLOW = ("table2",)  # at the tiny scale what table1 is


@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in FILES for name in names(k) if name not in SLOW])
def test_an_experiment_runs_and_reports(kind: str, name: str, tmp_path: Path) -> None:
    experiment = find_experiment(kind, name)
    seeds = (0, 1) if kind == "claim" else (0,)
    found = perform(experiment, Bench("tiny", tmp_path, seeds=seeds, console=Console(quiet=True)))
    tables, remarks = experiment.tables(found["result"]), experiment.remarks(found["result"])
    assert tables
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
    assert remarks
    assert all(remark.endswith(".") for remark in remarks)
    pictures = sorted((tmp_path / "figures").glob("*.png"))
    assert bool(pictures) == (name != "table3")
    for path in pictures:
        assert path.stat().st_size > 2000
        assert path.with_suffix(".svg").stat().st_size > 1000
    text = (tmp_path / "result.md").read_text()
    captions = re.findall(r"^!\[[^]]+\]\(figures/(.+)\)\n\n\*([^*]+\.)\*$", text, flags=re.MULTILINE)
    assert sorted(Path(file).stem for file, _ in captions) == [path.stem for path in pictures]
    assert all((tmp_path / "figures" / file).stat().st_size > 2000 for file, _ in captions)
    assert not list(tmp_path.glob("runs/**/checkpoint.pt"))
    assert (tmp_path / "report.html").exists()
    assert [words for words in (experiment.title, *SAID.get(name, ())) if words not in text] == []


TOGETHER: Any = {"row": "ghost+decay+weighing", "batch": 32, "rate": 0.1, "seed": 0, **DIGITS, "epochs": 2}
# A function that does a job, the job, and a step in its middle.
CASES: dict[str, tuple[Callable[[Any, Path], dict[str, Any]], Any, int]] = {
    "batch_size": (batch_size.train, batch_size.Training("bcn+ws", 16, 0, **DIGITS), 3),
    "disparity": (disparity.train, disparity.Training("brn", "sorted", 8, 0, **DIGITS), 5),
    "pre_post_ln": (encoders.train, encoders.Training("text", "post", "ln", "adam 1e-3", True, 0, **ENCODER), 4),
    "gan": (adversarial.play, adversarial.Game("hinge", "sn", 0, 4), 3),
    "why_bn": (why_bn.train, why_bn.Training("noisy", 0.05, True, 0, **{**IMAGES, "train": 128}, steps=4), 3),
    "gradnorm": (gradnorm.train, gradnorm.Training("additive", 0, 5), 3),
    "linear_part": (linear_part.train, linear_part.Training("ReLU", "BatchNorm", True, 0, 5), 3),
    "conditioning": (conditioning.descend, conditioning.Descent("bn", "e-temperature", 0.3, True, 0, 4), 3),
    "four_benefits": (four_benefits.train, four_benefits.Training("wn", 0.1, 10.0, 0, **{**DIGITS, "epochs": 4}), 3),
    "small_table": (four_improvements.train, small_table.Training(**TOGETHER), 3),
    "table4": (learn_scene, on_balls(recipe="none+e@re:trunk"), 4),
    "shape": (learn_solid, on_a_torus(recipe="none+e@re:trunk"), 6),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stop_leaves_no_trace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, job, middle = CASES[name]
    whole = function(job, tmp_path / "whole")
    reseed, done = walk.reseed, list[int]()

    def stop(seed: int, purpose: str, number: int = 0) -> None:
        done.append(number)
        if done.count(middle) == 1 == len(done) - done.index(middle):
            raise Stop
        reseed(seed, purpose, number)

    monkeypatch.setattr(walk, "PAUSE", 0.0)
    monkeypatch.setattr(walk, "reseed", stop)
    with pytest.raises(Stop):
        function(job, tmp_path / "parts")
    stopped = len(done)
    assert function(job, tmp_path / "parts") == whole
    assert 1 not in done[stopped:]  # not all again


def test_condition_numbers_of_updates_survive_a_stop(tmp_path: Path) -> None:
    (plan,) = equilibrate.plans("tiny")
    job = replace(plan.base, name="MuonEq-R + E", recipe="keep+e@all", optimizer="muoneq", rate=0.01, epochs=3)
    whole = equilibrate.follow(job, tmp_path / "whole")
    with at_call(learning, "tell", 2), pytest.raises(Stop):
        equilibrate.follow(job, tmp_path / "parts")
    assert equilibrate.follow(job, tmp_path / "parts") == whole
    assert [1 < k < 1e3 for kind in equilibrate.KINDS for k in whole["curve"][kind]] == [True] * 6


@pytest.mark.parametrize("method", batch_size.METHODS)
def test_every_method_normalizes_maps_and_vectors(method: str) -> None:
    model = SmallCNN(batch_size.norm(method, 100), width=4)
    if method.endswith("+ws"):
        apply_recipe(model, "keep+ws")
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    x = torch.randn(16, 8, 4, 4)
    assert_close(batch_size.norm("ghost", 9)(8)(x), batch_size.norm("bn", 9)(8)(x))  # up to 16 they are one batch


def test_sorted_batches_are_of_two_classes() -> None:
    labels = torch.randint(5, (203,), generator=torch.Generator().manual_seed(0))
    one, same, other = (disparity.sorted_order(labels, 8, seed=1, epoch=epoch) for epoch in (2, 2, 3))
    assert len(one.unique()) == len(one) > 180
    assert all(len(labels[block].unique()) == 1 for block in one.split(4))
    assert one.tolist() == same.tolist() != other.tolist()


def test_the_plan_has_every_optimizer_warm_up_and_norm() -> None:
    small, full = pre_post_ln.plan(True), pre_post_ln.plan(False)
    assert len(small) == 3 * 2 * 2 + 2 * 2 + 3 * 2
    assert len(full) == 4 * 3 * 2 * 2 + 3 * 2
    assert all(one in full for one in small)


@pytest.mark.parametrize("base", conditioning.BASES)
def test_controls_begin_with_the_function_they_control(base: str) -> None:
    x, found = torch.randn(8, 16, dtype=torch.float64), {}
    for form in conditioning.FORMS:
        torch.manual_seed(0)
        model = conditioning.make(base, form, 5)
        found[form] = model(x)
        lengths = [weight.norm(dim=1) for weight in conditioning.weights(model)]
        unit = [bool((norms - 1).abs().max() < 1e-12) for norms in lengths]
        whole = form in ("e", "unit", "e-temperature")
        assert unit == [whole or form == "e-hidden"] * 2 + [whole or form == "e-last"], form
    assert_close(found["wn"], found[""])
    for form in ("unit", "e-temperature"):
        assert_close(found[form], found["e"])
    # A logit lies within the norm of its features about its bias.
    model = conditioning.make(base, "e-last", 5)
    features = model[:-1](x).norm(dim=1, keepdim=True)
    assert ((model(x) - model[-1].bias).abs() <= features * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", blog_table.METHODS)
def test_measurements_are_as_the_cards_say(name: str, tmp_path: Path) -> None:
    found, card = blog_table.measure(blog_table.Measurement(name), tmp_path), method(name)
    assert (found["batch"] > blog_table.SAME) == card.batch_dependent
    assert found["running"] == card.running_state
    assert (found["evaluation"] <= blog_table.SAME) == card.train_equals_eval
    assert (found["fold"] is not None) == card.foldable
    assert found["fold"] is None or found["fold"] < blog_table.SAME
    blind = {"instance_norm": ("all channels", "one channel"), "layer_norm": ("all channels",)}
    # 200 of each kind: the AUC of chance has deviation 0.03.
    assert all(abs(found["contrast"][kind] - 0.5) < 0.1 for kind in blind.get(name, ()))
    streamed = {"instance_norm": found["stream"] is None, "layer_norm": (found["stream"] or 0.0) < 1e-12}
    assert {**streamed, "group_norm": (found["stream"] or 0.0) > 0.1}.get(name, True)
    if name == "spectral_norm":
        assert_close(found["spectrum"][1][0], 1.0, atol=1e-4, rtol=0)
    if name == "weight_norm":
        assert found["drift"] == sorted(found["drift"])


def test_repetitions_are_measured_one_after_the_other(tmp_path: Path) -> None:
    asked = []

    class Alone(Bench):
        def sweep(self, function: Any, jobs: Any) -> list[dict[str, Any]]:
            asked.append([(job.kind, job.seed) for job in jobs])
            return [{"ms": {}, "mb": {}} for _ in jobs]

    found = cost_activations.run(Alone("small", tmp_path, seeds=(0, 1)))
    each = [(kind, seed) for seed in (0, 1) for kind in cost_activations.SHAPES]
    assert asked == [[one] for one in each]
    assert [(run["kind"], run["seed"]) for run in found["runs"]] == each


@pytest.mark.parametrize("rates", [(1e-3, 1e30), (1e30, 1e-3)])
def test_a_discriminator_or_generator_that_diverges_is_recorded(
    rates: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adversarial, "RATES", rates)
    result = perform(gan.EXPERIMENT, Bench("tiny", tmp_path, seeds=(0,), console=Console(quiet=True)))["result"]
    lost = [run for run in result["runs"] if run["status"] == walk.DIVERGED]
    # Clipping keeps a discriminator's weights finite whatever its rate is.
    assert {run["kind"] for run in lost} == set(gan.KINDS) - ({"clip"} if rates[1] > 1 else set())
    assert all(run["modes"] is None and run["spectra"] is None and run["field"] is None for run in lost)
    assert gan.tables(result)[0].rows[0][1:] == ["–"] * 6
    said = gan.remarks(result)
    assert f"{len(lost)} of 10 runs diverged." in said
    # It covers no modes, and is not left out.
    assert any("modes covered" in remark and "nothing 0.0" in remark for remark in said)


def runs_of(values: Sequence[Any], key: str, **about: Any) -> list[dict[str, Any]]:
    """A run per seed with a value under a key; one that diverged has None."""
    status = {None: walk.DIVERGED}
    return [{**about, "seed": k, key: value, "status": status.get(value, walk.OK)} for k, value in enumerate(values)]


def accuracies(values: Sequence[float | None], **about: Any) -> list[dict[str, Any]]:
    found = runs_of(values, "score", ranges=None, **about)
    return [{**run, "accuracy": dict.fromkeys(("running", "batch", "precise"), run["score"])} for run in found]


def test_a_run_that_diverged_counts_where_batch_sizes_are_compared() -> None:
    found = {
        ("bn", 32): (0.5, 0.5, 0.5),
        ("bn", 1): (0.3, None, 0.3),
        ("gn", 1): (0.32, 0.4, 0.4),
        ("gn", 32): (0.5,) * 3,
        **{(method, 1): (0.4,) * 3 for method in ("gn+ws", "bcn+ws", "brn")},
    }
    runs = [run for (method, batch), some in found.items() for run in accuracies(some, method=method, batch=batch)]
    said = " ".join(batch_size.remarks({"runs": runs, "batches": [1, 32]}))
    assert "BatchNorm: 50.0 % at batch 32, 23.3 % at batch 1, a change of -26.7 points (95 % interval" in said
    # Seeds differ too much to tell, though two of three are above.
    assert "Batch 1: GroupNorm is not told apart from BatchNorm, by +14.0" in said
    assert "in %, the same networks: running statistics 30.0 ± 0.0 (1 of 3 without)" in said


def test_disparity_is_told_with_its_interval_and_without_a_renorm_that_diverged() -> None:
    about = {"order": "shuffled", "batch": 4}
    bn = accuracies([0.4, 0.41], method="bn", **about)
    for seed, run in enumerate(bn):
        run["accuracy"] |= {"batch": 0.42 + seed / 100, "precise": 0.43, "weighed": 0.5 * seed}
    said = disparity.remarks({"runs": [*bn, *accuracies([None, None], method="brn", **about)], "batches": [4]})
    assert "those of shuffled test batches +2.0 points (95 % interval +2.0 to +2.0)" in said[0]
    assert "BatchRenorm -30.5 points (95 % interval -36.9 to -24.1)" in said[0]
    assert said[-1].startswith("2 of 4 runs diverged")


def test_what_a_warm_up_did_is_told_for_every_task() -> None:
    places = [(placement, depth) for placement in pre_post_ln.PLACEMENTS for depth in (1, 2)]
    start = {"seed": 0, "token": [1.0], "batch": [1.0]}
    losses: dict[Any, Sequence[float | None]] = {
        ("sort", "post", False): [1.36, 1.35, 1.70],
        ("sort", "post", True): [1.48, 1.49, 2.06],
        ("sort", "pre", False): [0.6, 0.6, 0.6],
        ("sort", "pre", True): [0.6, None, 0.6],
        ("text", "post", False): [3.1, 3.1, 3.1],
        ("text", "post", True): [3.1, 3.1, 3.0],
    }
    keys = ("task", "placement", "warmup")
    abouts = [dict(zip(keys, key, strict=True), norm="ln", optimizer="adam 1e-3") for key in losses]
    found = {
        "starts": [{"placement": placement, "depth": depth, **start} for placement, depth in places],
        "guess": {"sort": 2.77, "text": 3.1},
        "runs": [
            run for about, some in zip(abouts, losses.values(), strict=True) for run in runs_of(some, "loss", **about)
        ],
    }
    *_, sort, text, failed = pre_post_ln.remarks(found)
    # Worse in every seed, and by three seeds not told apart from no effect.
    assert "Post-LN ends at 1.47 without warm-up and 1.68 with, lower in 0 of 3 seeds, a change of +0.21 [-0.1" in sort
    assert "Pre-LN diverged in 0 of 3 seeds without warm-up and 1 of 3 with." in sort
    assert text.startswith("Text, Adam 1e-3: Post-LN ends at 3.10")
    assert "Post-LN on text with Adam 1e-3, no warm-up; Post-LN on text with Adam 1e-3, 10 % warm-up." in failed


def test_the_bound_that_is_told_is_the_product_of_sigmas() -> None:
    row = {"sigmas": [1.05, 1.17, 1.0], "bound": 1.2285, "steepest": 0.6}
    looks: dict[str, Any] = {way: [{"iterations": 1, "error": None}] * 2 for way in ("kept", "fresh")}
    run = {"loss": "hinge", "kind": "sn", "status": "ok", "modes": 8, "spectra": None, "rows": [{**row, **looks}]}
    said = gan.remarks({"runs": [run]})[0]
    assert "up to 1.1700" in said
    assert "bound, their product, is up to 1.2285" in said
    assert "a lower estimate, was 0.600, below 1" in said


def test_why_bn_tells_what_paired_seeds_and_the_losses_say() -> None:
    ends = {"none": (1.5, 1.6, 1.7), "bn": (1.2, 1.3, 1.4), "noisy": (1.3, 1.7, 1.6)}
    short = {("none", 0.1): 1.5, ("none", 1.0): None, ("bn", 0.1): 1.4, ("bn", 1.0): 1.9}
    runs = []
    for (name, rate), end in short.items():
        runs += runs_of([end] * 3, "end", method=name, rate=rate, measured=False)
    for name, some in ends.items():
        runs += runs_of(some, "end", method=name, rate=why_bn.RATE, measured=True, rows=[])
    result = {"runs": runs, "rates": [0.1, 1.0], "short": 50}
    said = why_bn.remarks(result)
    told = next(remark for remark in said if "with noise minus no norm -0.07 [" in remark)
    assert told.endswith("], not told apart.")
    assert said[-1].endswith("no norm 1.50 (rate 0.1); BatchNorm 1.40 (rate 0.1).")
    runs[-1]["end"] = None
    assert "noise behind it 1.77" in " ".join(why_bn.remarks(result))


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((0.7, 0.71, 0.72), "0.69 to 0.73: less."),
        ((0.9, 0.98, 1.04), "not told apart."),
        ((0.5,), "0.50 of the time of layer normalization in one repetition, which has no interval."),
    ],
)
def test_a_norm_costs_less_where_repetitions_agree(times: Sequence[float], said: str) -> None:
    runs = [{"kind": "tokens", "ms": {"rms_norm": time, "layer_norm": 1.0}, "mb": {}} for time in times]
    assert cost_activations.remarks({"runs": runs})[0].endswith(said)


def benefits(**found: Sequence[tuple[int | None, float | None, float | None]]) -> dict[str, Any]:
    """Runs with steps, training and test accuracy for each seed, the same at every scale; methods not given are as "none"."""
    runs = [
        {"method": method, "scale": scale, "seed": seed, "status": "ok" if test else "diverged", "planned": 100}
        | {"steps": count, "train": train, "test": test}
        for method in four_benefits.METHODS
        for scale in four_benefits.SCALES
        for seed, (count, train, test) in enumerate(found.get(method, found["none"]))
    ]
    return {"runs": runs}


def test_a_norm_is_better_where_the_interval_of_paired_seeds_says_so() -> None:
    base = [(60, 0.5, 0.40), (70, 0.5, 0.41), (80, 0.5, 0.42)]
    result = benefits(
        none=base,
        bn=[(s - 20 - s // 80, 0.6, test + 0.05 + 0.001 * s / 60) for s, _, test in base],  # pairs agree
        ln=[(50, 0.5, 0.43), (70, 0.5, 0.42), (89, 0.5, 0.383)],  # means a little better, pairs do not agree
        gn=[(None, 0.4, 0.3)] * 3,
    )
    fewer, more, unsure = four_benefits.verdict(result, "steps", 1, "fewer", "more").split("; ")
    assert fewer == "fewer: BatchNorm -20.3 [-21.8, -18.9]"
    assert more.startswith("more: GroupNorm +35.0 [")
    assert unsure.startswith("not told apart: LayerNorm -0.3 [")
    by_test = four_benefits.verdict(result, "test", 100, "better", "worse", higher_first=True)
    for told in ("better: BatchNorm +5.1 [", "not told apart: LayerNorm +0.1 [", "worse: GroupNorm -11.0 ["):
        assert told in by_test
    said = " ".join(four_benefits.remarks(result))
    # Both the gap and the training accuracy at which it is smaller.
    assert "smaller: BatchNorm" not in said
    for told in ("LayerNorm 3 of 3", "GroupNorm 0 of 3", "training accuracy, %: no norm 50.0 ± 0.0, BatchNorm 60.0"):
        assert told in said


def test_surviving_seeds_do_not_make_a_norm_better() -> None:
    result = benefits(none=[(60, 0.5, 0.4)] * 2, bn=[(40, 0.6, 0.5), (None, None, None)])
    counted = [four_benefits.counted(result, "bn", key) for key in ("steps", "test")]
    assert counted == [[40, 105], [0.5, four_benefits.CHANCE]]
    for key in ("steps", "test"):
        assert "not told apart: BatchNorm" in four_benefits.verdict(result, key, 1, "lower", "higher")
    assert "one seed alone, without an interval: BatchNorm" in four_benefits.verdict(result, "gap", 1, "less", "more")
    assert "3 of 48 runs diverged" in four_benefits.remarks(result)[-1]
    for run in result["runs"]:
        run["test"] = None if run["scale"] == 10 and run["seed"] == 1 else 0.5
    assert four_benefits.counted(result, "bn", "range") == [0.0, pytest.approx(0.4)]
