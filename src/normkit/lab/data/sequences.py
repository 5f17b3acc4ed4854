"""Sequences that a transformer must turn into others: copying, sorting and adding, drawn without end, and a short text."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from normkit.core.errors import OptionError

TASKS = ("copy", "sort", "add", "text")


def draw(task: str, samples: int, length: int, vocabulary: int = 16) -> tuple[Tensor, Tensor]:
    """Draws sequences from torch's global generator.

    ========  =========================================================================================================
    ``copy``  the same tokens
    ``sort``  the same tokens in ascending order
    ``add``   at each place, the sum of its token and of the one before it (of the last, at the first) modulo the vocabulary
    ``text``  at each place, the character that follows, in a passage of :func:`text`; the vocabulary is the text's own
    ========  =========================================================================================================

    Tokens and targets are both (samples, length).
    """
    if task not in TASKS:
        raise OptionError(f"draw: there is no task {task!r}; there are {', '.join(TASKS)}")
    if task == "text":
        codes, _ = text()
        windows = codes.unfold(0, length + 1, 1)
        drawn = windows[torch.randint(len(windows), (samples,))]
        return drawn[:, :-1], drawn[:, 1:]
    tokens = torch.randint(vocabulary, (samples, length))
    if task == "copy":
        return tokens, tokens
    if task == "sort":
        return tokens, tokens.sort(dim=1).values
    return tokens, (tokens + tokens.roll(1, dims=1)) % vocabulary


@lru_cache
def text() -> tuple[Tensor, str]:
    """Gives two chapters of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865) as numbers, and their characters."""
    content = (Path(__file__).parent / "alice.txt").read_text("ascii")
    characters = "".join(sorted(set(content)))
    return torch.tensor([characters.index(letter) for letter in content]), characters


def guess(task: str, vocabulary: int = 16) -> float:
    """The loss, in nats a token, of one who knows how often each token is asked for but looks at nothing."""
    if task != "text":
        return torch.tensor(float(vocabulary)).log().item()
    codes, characters = text()
    shares = torch.bincount(codes, minlength=len(characters)).double() / len(codes)
    return -(shares * shares.log()).sum().item()
