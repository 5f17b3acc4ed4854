"""The handwritten digits that come with scikit-learn."""

import numpy as np
import torch

from normkit.lab.data.split import Data, Split, hold_out


def digits() -> Data:
    """Loads 1,797 handwritten digits of 8x8 pixels and 10 classes; 40 % train, 20 % val, 40 % test, stratified.

    Pixels are standardized by the one mean and standard deviation of the train split. No download: the images are part
    of scikit-learn.

    Shape:
        Inputs ``(n, 1, 8, 8)`` float32, targets ``(n,)`` int64.

    Reference: Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.asarray(images, dtype=np.float32)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    # What is parted are row numbers, so that the scale can come from the train split alone.
    rest, test = hold_out(Split(targets, torch.arange(len(targets))), 0.4, seed=0)
    train, val = hold_out(rest, 1 / 3, seed=1)
    rows = [torch.as_tensor(part.inputs) for part in (train, val, test)]
    std, mean = torch.std_mean(pixels[rows[0]])
    return Data(*(Split(targets[part], (pixels[part] - mean) / std) for part in rows))  # pyright: ignore[reportArgumentType]
