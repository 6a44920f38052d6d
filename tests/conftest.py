"""Every run of the tests draws the same hypothesis examples, so that a commit passes or fails for what is in it.

``--hypothesis-profile=default`` draws new ones: `make explore` looks for what no run has seen yet.
"""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
