"""The handwritten digits that come with scikit-learn."""

import numpy as np
import torch

from normkit.lab.data.split import Data, Split, hold_out


def digits() -> Data:
    """Loads 1,797 handwritten digits of 8x8 pixels and 10 classes; 60 % train, 20 % val, 20 % test, stratified.

    Pixels are standardized by the one mean and standard deviation of the train split. No download: the images are part of
    scikit-learn.

    Shape:
        Inputs ``(n, 1, 8, 8)`` float32, targets ``(n,)`` int64.

    Reference:
        Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80

    >>> [len(split) for split in digits().splits.values()]
    [1079, 359, 359]
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.asarray(images, dtype=np.float32)).view(-1, 1, 8, 8)
    everything = Split(torch.from_numpy(np.asarray(labels, dtype=np.int64)), pixels)
    rest, test = hold_out(everything, 0.2, seed=0)
    train, val = hold_out(rest, 0.25, seed=1)
    std, mean = torch.std_mean(train.inputs)  # pyright: ignore[reportCallIssue, reportArgumentType]
    scaled = [Split(part.targets, (part.inputs - mean) / std) for part in (train, val, test)]  # pyright: ignore[reportOptionalOperand]
    return Data(*scaled)
