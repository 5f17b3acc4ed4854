"""Settings of a comparison: their range, and the command that says them."""

from pathlib import Path
from typing import Any

import pytest

from normkit.core.errors import OptionError
from normkit.lab.comparison import command, default_output
from normkit.lab.settings import Reports, Settings, Site, first_seeds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": ()}, "wanted at least one seed"),
        ({"seeds": (0, 0)}, "different seeds"),
        ({"rates": (0.1, 0.0)}, "rates is .*above 0"),
        ({"rates": (float("nan"),)}, "above 0"),
        ({"rates": (0.1, 0.1)}, "different learning rates"),
        ({"epochs": 0}, "epochs is 0; wanted a whole number from 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; wanted sgd or adam or adamw or muon or muoneq"),
        ({"optimizer": "muoneq", "strategy": "fsdp"}, "muoneq needs whole matrices"),
        ({"schedule": "linear"}, "schedule is 'linear'; wanted cosine or constant or step"),
        ({"strategy": "pipeline"}, "strategy is 'pipeline'; wanted auto or ddp or fsdp"),
        ({"warmup": 12.0}, "warmup is 12.0; wanted from 0 to below the 12 epochs"),
        ({"accumulate": 65}, "accumulate is 65; wanted at most the 64 samples"),
        ({"clip": 0.0}, "clip is 0.0; wanted a length above 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"level": 95.0}, "level is 95.0"),
        ({"target": float("nan")}, "target is nan"),
    ],
)
def test_settings_outside_their_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings(**options)


def test_the_same_recipe_twice() -> None:
    with pytest.raises(OptionError, match="are the same"):
        Settings(recipes=("bn", "bn+e", "bn+e@first_last")).canonical()


def test_the_command_says_what_differs() -> None:
    settings = Settings(model="a.b:c", seeds=first_seeds(5), rates=(0.5, 0.1), condition=False, target=0.9)
    words = "normkit compare --model a.b:c --seeds 5 --rates 0.1,0.5 --target 0.9 --no-condition"
    assert command(settings, Site(default_output(settings))) == words
    assert command(Settings(), Site(Path("else where"))) == "normkit compare --output 'else where'"
    assert command(Settings(), Site(Path("runs/digits-inception"), Path("sets"))) == "normkit compare --data-root sets"
    site = Site(Path("out"), Path("sets"), ray="local", threads=2, tensorboard=True)
    words = "normkit compare --output out --data-root sets --ray --threads 2 --tensorboard --no-report"
    assert command(Settings(), site, Reports(report=False, overwrite=True)) == words
