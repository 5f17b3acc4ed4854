"""Models that the lab brings with it; any other is named as ``package.module:factory``."""
