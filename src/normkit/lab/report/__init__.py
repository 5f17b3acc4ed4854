"""The report of a comparison or an experiment, a pure function of the records: the same folder gives the same bytes."""
