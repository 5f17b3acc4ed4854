"""The lab: fair comparisons of recipes on a user's own model and data; needs the extra ``normkit[lab]``."""
