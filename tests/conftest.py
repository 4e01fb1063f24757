"""For all tests: hypothesis judges results, not how long this machine takes for them."""

from hypothesis import settings

settings.register_profile("farrier", deadline=None)
settings.load_profile("farrier")
