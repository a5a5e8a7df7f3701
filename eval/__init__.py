import runtime  # noqa: F401  before PyTorch: how its threads wait
