"""Normalizations of data, fitted on the training set and kept in a model; one family per file."""

from normkit.preprocessing.feature_scaling import MaxAbsScaling, MeanNormalization, MinMaxScaling, RobustScaling, ZScore
from normkit.preprocessing.image_standardization import ImageStandardization
from normkit.preprocessing.sample_scaling import GlobalContrast, UnitLength
from normkit.preprocessing.whitening import Whitening

__all__ = [
    "GlobalContrast",
    "ImageStandardization",
    "MaxAbsScaling",
    "MeanNormalization",
    "MinMaxScaling",
    "RobustScaling",
    "UnitLength",
    "Whitening",
    "ZScore",
]
