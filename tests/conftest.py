"""For all tests."""

from hypothesis import settings

# A time limit per example fails on a busy machine only; pytest's own timeout catches what hangs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
