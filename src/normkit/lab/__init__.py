"""The lab: fair comparisons of normalization recipes on a model and data of the user's choice (the extra ``normkit[lab]``)."""
