"""The report of a comparison: a table in the terminal, figures for a paper and one page for the browser.

Each is a pure function of the records: the same folder gives the same bytes.
"""
