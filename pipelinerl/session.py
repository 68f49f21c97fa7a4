"""The running processes of a run: Ray, engines, trainer ranks and the weight transport between them."""
