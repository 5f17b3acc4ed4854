"""The idea as data: support sets, statistics, compensation, memory, rules. Imports torch alone."""
