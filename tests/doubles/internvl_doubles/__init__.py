"""Fakes of what can not be installed here: strict, and for tests alone."""
